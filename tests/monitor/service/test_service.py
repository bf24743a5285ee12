"""The service as its users meet it: a real server over runs that a sink writes."""

import csv
import http.client
import io
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request

import numpy as np
import prometheus_client.parser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.service import Service
from monitor.service.thinning import kept
from monitor.sinks import ParquetSink
from tests.monitor.service.served import ask, record, refused
from tests.recorded import get, page, said


def test_an_empty_root_has_no_runs_until_one_appears(tmp_path, serve):
    service = serve()
    assert ask(service, "/api/runs") == []
    record(tmp_path, 10, 20)
    (run,) = ask(service, "/api/runs")
    assert (run["first_step"], run["last_step"], run["measurements"]) == (10, 20, 2)
    assert (run["tokens"], run["state"]) == (2_000, "running")
    record(tmp_path, 30)
    assert ask(service, "/api/runs")[0]["last_step"] == 30


def test_series_of_several_runs(tmp_path, serve):
    for run in "ab":
        record(tmp_path, 1, 2, run=run)
    asked = {"run": ["a", "b"], "table": "heads", "field": "score", "layer": 1, "head": 0}
    rows = ask(serve(), "/api/series", axis="tokens", **asked)
    assert [(r["run"], r["axis"]) for r in rows] == [("a", 100), ("a", 200), ("b", 100), ("b", 200)]
    first = {k: rows[0][k] for k in ("stderr", "null", "validity", "layer", "head")}
    assert first == {"stderr": 0.125, "null": 0.25, "validity": "ok", "layer": 1, "head": 0}
    assert rows[0]["value"] == pytest.approx(1.01)


def test_csv_says_what_json_says(tmp_path, serve):
    record(tmp_path, 1, 2)
    service, asked = serve(), {"run": "r", "table": "losses", "field": "loss"}
    text, kind = get(f"{service.url}/api/series?{urllib.parse.urlencode(asked)}&format=csv")
    assert kind.startswith("text/csv")
    rows = ask(service, "/api/series", **asked)
    assert [float(r["value"]) for r in csv.DictReader(io.StringIO(text))] == [
        r["value"] for r in rows
    ]


def test_what_a_restart_supersedes_is_gone(tmp_path, serve):
    record(tmp_path, 1, 2, 3)
    service, asked = (
        serve(),
        {"run": "r", "table": "heads", "field": "score", "layer": 0, "head": 0},
    )
    assert [r["axis"] for r in ask(service, "/api/series", **asked)] == [1, 2, 3]
    ParquetSink(tmp_path, "r").supersede(after=1)
    record(tmp_path, 2, attempt=2)
    rows = ask(service, "/api/series", **asked)
    assert [round(r["value"], 2) for r in rows] == [1.01, 2.02]


def test_corrupt_and_foreign_files_are_left_out_and_said(tmp_path, serve, caplog):
    record(tmp_path, 1)
    folder = tmp_path / "losses" / "run=r"
    (folder / f"{2:012d}.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"loss": [1.0]}), folder / f"{3:012d}.parquet")
    service = serve()
    rows = ask(service, "/api/series", run="r", table="losses", field="loss")
    assert [r["axis"] for r in rows] == [1]
    assert sum("is left out" in text for text in said(caplog)) == 2


def test_nothing_outside_the_root_is_served(tmp_path, serve):
    outside, root = tmp_path / "outside", tmp_path / "root"
    record(outside, 1, run="secret")
    record(root, 1)
    (root / "linked").symlink_to(outside / "heads")
    (root / "heads" / "run=linked").symlink_to(outside / "heads" / "run=secret")
    stolen = root / "heads" / "run=r" / f"{9:012d}.parquet"
    stolen.symlink_to(outside / "heads" / "run=secret" / f"{1:012d}.parquet")
    service = serve(root)
    assert [(r["run"], r["last_step"]) for r in ask(service, "/api/runs")] == [("r", 1)]
    for run in ("../../outside/heads/run=secret", "linked", "secret", "/etc", ".."):
        assert refused(service, "/api/tables", run=run)[0] == 404
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"))
    connection.request("GET", "/../outside/heads")
    assert connection.getresponse().status == 404
    connection.close()
    assert refused(service, "/api/series?run=r&table=../outside&field=x")[0] == 400


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("table=heads&field=score", "no run="),
        ("run=r&table=head&field=score", "did you mean 'heads'"),
        ("run=r&table=heads&field=by", "unknown field"),
        ("run=r&table=heads&field=score&axis=x", "unknown axis"),
        ("run=r&table=heads&field=score&points=3", "from 4"),
        ("run=r&table=heads&field=score&format=xml", "unknown format"),
        ("run=r&table=heads&field=score&depth=1", "unknown dimension"),
        ("run=r&table=heads&field=score&layer=x", "whole number"),
    ],
)
def test_errors_say_what_was_wrong(tmp_path, serve, query, told):
    record(tmp_path, 1)
    code, answer = refused(serve(), f"/api/series?{query}")
    assert code == 400
    assert told in answer["error"]


def test_metrics_of_all_runs_are_one_page(tmp_path, serve):
    for run in "ab":
        record(tmp_path, 1, 2, run=run)
    text = page(serve().url)
    families = list(prometheus_client.parser.text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    scores = next(f for f in families if f.name == "phasewatch_heads_score").samples
    assert {s.labels["run"] for s in scores} == {"a", "b"}
    assert len(scores) == 8
    if promtool := shutil.which("promtool"):
        done = subprocess.run([promtool, "check", "metrics"], input=text, text=True, check=False)
        assert done.returncode in (0, 3)  # 3: only remarks on style


def test_the_series_budget_holds_for_every_table(tmp_path, serve):
    record(tmp_path, 1)
    assert page(serve(budget=8).url).count("\nphasewatch_heads_score{") == 2


def test_answers_are_whole_while_a_run_is_written(tmp_path, serve):
    record(tmp_path, 0)
    service = serve()
    writer = threading.Thread(target=record, args=(tmp_path, *range(1, 60)))
    writer.start()
    asked = {"run": "r", "table": "heads", "field": "score"}
    while writer.is_alive():
        assert len(ask(service, "/api/series", **asked)) % 4 == 0
    writer.join()
    assert len(ask(service, "/api/series", **asked)) == 240


def test_a_taken_port_is_passed_over(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        service = Service(tmp_path, port=taken.getsockname()[1])
        service.close()
    assert "runs are served at port" in said(caplog)[0]


@pytest.mark.parametrize("length", [3, 50, 1_000, 100_000])
@pytest.mark.parametrize("points", [4, 25, 1_000])
def test_thinning_keeps_the_extremes(length, points):
    rng = np.random.default_rng(length)
    values = rng.normal(size=length)
    values[rng.random(length) < 0.1] = np.nan
    at = kept(values, points)
    assert len(at) <= max(points, 2)
    assert list(at) == sorted(set(at))
    if length > points:
        numbers = [i for i in range(length) if not np.isnan(values[i])]
        expected, stretches = {0, length - 1}, (points - 2) // 2
        for k in range(stretches):
            part = numbers[k * len(numbers) // stretches : (k + 1) * len(numbers) // stretches]
            if part:
                expected |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
        assert set(at) == expected
        assert np.nanmin(values[at]) == np.nanmin(values)
        assert np.nanmax(values[at]) == np.nanmax(values)
