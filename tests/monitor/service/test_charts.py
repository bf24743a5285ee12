"""Series and rows, against what pandas finds by looking at everything."""

import csv
import io
import json
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

import monitor
from monitor.detection import table
from monitor.record import HEAD, LAYER, Dim, Field, Measurement, ProbeSpec, Reading
from monitor.sinks import ParquetSink
from tests.monitor.detection.made_up import notice
from tests.monitor.service.served import ask, record, refused, text
from tests.monitor.sinks.fabricated import START, moment

SPEC = ProbeSpec(
    name="scores",
    help="Made-up scores.",
    source="Nobody 2026",
    dims=(LAYER, HEAD, Dim(name="kind", help="A word.", text=True)),
    fields=(
        Field(name="score", help="Made up.", null="chance", null_sd=True),
        Field(name="bare", help="Made up.", stderr=False),
        Field(name="word", help="Made up.", stderr=False, text=True),
        Field(name="all", help="Made up.", stderr=False, per="position"),
    ),
    needs=(),
)
ASKED = {"run": "r", "table": "scores", "field": "score"}


def write(root, step, rows, *, run="r", tokens=True, spec=SPEC, attempt=1):
    """Rows of (layer, head, kind, score, validity) at a step."""
    layer, head, kind, score, validity = zip(*rows, strict=True)
    count = len(rows)
    columns = {
        "layer": layer,
        "head": head,
        "kind": kind,
        "score": score,
        "score_stderr": np.full(count, 0.125),
        "score_null": [0.5 if at % 2 else 0.25 for at in layer],
        "score_null_sd": np.full(count, 0.0625),
        "bare": np.arange(count),
        "word": ['a "b"\n', None, "c"][:count] + ["d"] * (count - 3),
        "all": [[1.0, float(at)] for at in range(count)],
        "n": np.full(count, 16),
        "validity": validity,
    }
    when = moment(step, run=run, tokens=100 * step if tokens else None, attempt=attempt)
    kept = {name: values for name, values in columns.items() if name in spec.schema.names}
    reading = Reading.build(spec, when, kept)
    ParquetSink(root, run).write(Measurement(moment=when, readings=(reading,)))


def write_random(root, *, measurements=30, run="r", seed=0):
    """Series that come, go, change places, and are now and then of no use."""
    random = np.random.default_rng(seed)
    series = [(layer, head, kind) for layer in (0, 1) for head in (0, 1, 2) for kind in "ab"]
    for step in range(measurements):
        shown = random.permutation(len(series))[: int(random.integers(1, len(series) + 1))]
        rows = [
            (*series[at], float(random.normal()), "ok" if random.random() < 0.8 else "too few")
            for at in (shown if step % 3 else sorted(shown))
        ]
        write(root, 10 * step, rows, run=run, tokens=step % 4 != 1)


def oracle(root, run="r"):
    """By series, its rows in order of steps."""
    frame = monitor.read(root, "scores", run=run)
    return {key: rows.sort_values("step") for key, rows in frame.groupby(["layer", "head", "kind"])}


def told_as(values):
    return [None if pd.isna(value) else value for value in values]


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_columns_are_what_is_stored(tmp_path, serve, axis):
    write_random(tmp_path)
    told = ask(serve(), "/api/series", **ASKED, format="columns", axis=axis)
    assert (told["table"], told["axis"]) == ("scores", axis)
    assert told["field"]["null"] == "chance"
    expected = oracle(tmp_path)
    dims = [tuple(series["dims"].values()) for series in told["series"]]
    assert dims == sorted(expected)
    for series in told["series"]:
        rows = expected[tuple(series["dims"].values())]
        assert series["run"] == "r"
        for name, column in (
            ("value", "score"),
            ("stderr", "score_stderr"),
            ("null", "score_null"),
            ("null_sd", "score_null_sd"),
        ):
            assert np.array_equal(np.float32(series[name]), rows[column].to_numpy(np.float32))
        if axis == "time":
            assert [datetime.fromtimestamp(at, UTC) for at in series["axis"]] == [
                at.to_pydatetime() for at in rows["time"]
            ]
        else:
            assert series["axis"] == told_as(rows[axis])
        if rows["validity"].eq("ok").all():
            assert "validity" not in series
        else:
            assert series["validity"] == rows["validity"].tolist()


def test_all_formats_say_the_same(tmp_path, serve):
    for run, seed in (("a", 1), ("b", 2)):
        write_random(tmp_path, run=run, seed=seed)
    service, asked = serve(), ASKED | {"run": ["a", "b"], "layer": 1, "axis": "tokens"}
    by_series = ask(service, "/api/series", **asked, format="columns")["series"]
    rows = ask(service, "/api/series", **asked)
    assert rows == [
        {"run": series["run"], "axis": series["axis"][at], **series["dims"]}
        | {name: series[name][at] for name in ("value", "stderr", "null", "null_sd")}
        | {"validity": series.get("validity", ["ok"] * len(series["axis"]))[at]}
        for series in by_series
        for at in range(len(series["axis"]))
    ]
    lines = list(csv.DictReader(io.StringIO(text(service, "/api/series", **asked, format="csv"))))
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows] == [
        {k: v if k in ("run", "kind", "validity") else plain(v) for k, v in line.items()}
        for line in lines
    ]


def plain(number: str) -> str:
    """As Python writes it."""
    return number if not number or number.lstrip("-").isdigit() else str(float(number))


def test_times_of_rows_are_told_as_text(tmp_path, serve):
    write(tmp_path, 1, [(0, 0, "a", 1.0, "ok")])
    (row,) = ask(serve(), "/api/series", **ASKED, axis="time")
    assert row["axis"] == START.replace(second=10).isoformat()


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_top_is_what_was_ever_furthest_above_its_null(tmp_path, serve, count):
    write_random(tmp_path)
    service = serve()
    for more in range(2):
        reached = {}
        for key, rows in oracle(tmp_path).items():
            fit = rows[rows["validity"].eq("ok")]
            if len(fit):
                reached[key] = (fit["score"] - fit["score_null"]).max()
        best = sorted(reached, key=reached.__getitem__, reverse=True)[:count]
        told = ask(service, "/api/series", **ASKED, top=count, format="columns")["series"]
        assert [tuple(series["dims"].values()) for series in told] == best
        if not more:
            # What was last becomes first, and a series that nobody knew comes second.
            write(tmp_path, 990, [(*min(reached), 1e3, "ok"), (7, 7, "z", 9e2, "ok")])


def test_the_top_is_looked_for_among_the_dimensions_that_are_named(tmp_path, serve):
    write(tmp_path, 1, [(0, 0, "a", 9.0, "ok"), (1, 0, "a", 2.0, "ok"), (1, 1, "a", 3.0, "ok")])
    told = ask(serve(), "/api/series", **ASKED, top=1, layer=1)
    assert [(row["layer"], row["head"]) for row in told] == [(1, 1)]


def test_files_are_read_once(tmp_path, serve, monkeypatch):
    write_random(tmp_path, measurements=20)
    service, read = serve(), []
    load = service._folder.load
    monkeypatch.setattr(
        service._folder, "load", lambda file, columns=None: read.append(file) or load(file, columns)
    )
    ask(service, "/api/series", **ASKED, layer=0)
    assert len(read) >= 20
    read.clear()
    ask(service, "/api/series", **ASKED, layer=1, axis="time")
    ask(service, "/api/series", **ASKED, top=2)
    assert read == []
    write(tmp_path, 990, [(0, 0, "a", 1.0, "ok")])
    ask(service, "/api/series", **ASKED, layer=1)
    assert {file.number for file in read} == {990}


def test_little_memory_changes_no_answer(tmp_path, serve):
    write_random(tmp_path)
    service = serve()
    service._gatherer._most = 1
    expected = ask(service, "/api/series", **ASKED)
    for field in ("bare", "score", "bare", "score"):
        told = ask(service, "/api/series", **ASKED | {"field": field})
    assert told == expected


def test_what_was_set_aside_is_measured_anew(tmp_path, serve):
    write_random(tmp_path)
    service = serve()
    ask(service, "/api/series", **ASKED)
    ParquetSink(tmp_path, "r").supersede(after=100)
    for step in (110, 120):
        write(tmp_path, step, [(0, 0, "a", 3.0, "ok"), (1, 2, "b", 4.0, "ok")], attempt=2)
        told = ask(service, "/api/series", **ASKED)
        expected = oracle(tmp_path)
        assert [row["value"] for row in told] == pytest.approx(
            [told_value for key in sorted(expected) for told_value in expected[key]["score"]]
        )


def test_a_field_that_an_attempt_did_not_measure(tmp_path, serve):
    rows = [(0, 0, "a", 1.0, "ok")]
    write(tmp_path, 1, rows, spec=SPEC.only(["bare"]))
    write(tmp_path, 2, rows)
    write(tmp_path, 3, rows, spec=SPEC.only(["score"]))
    service = serve()
    assert [row["axis"] for row in ask(service, "/api/series", **ASKED)] == [2, 3]
    write(tmp_path, 4, rows)
    bare = ask(service, "/api/series", **ASKED | {"field": "bare"})
    assert [row["axis"] for row in bare] == [1, 2, 4]


def test_rows_that_only_their_order_tells_apart(tmp_path, serve):
    write(tmp_path, 1, [(0, 0, "a", 1.0, "ok"), (0, 0, "a", 2.0, "ok")])
    assert [row["value"] for row in ask(serve(), "/api/series", **ASKED)] == [1.0, 2.0]


def test_more_rows_than_can_be_told(tmp_path, serve, monkeypatch):
    write_random(tmp_path)
    monkeypatch.setattr("monitor.service.charting._MOST_ROWS", 100)
    service = serve()
    code, told = refused(service, "/api/series", **ASKED, layer=0)
    assert code == 400
    assert "head, kind" in told["error"]
    assert len(ask(service, "/api/series", **ASKED, top=2)) > 0


@pytest.mark.parametrize(("step", "at"), [(None, 30), (30, 30), (29, 20), (10_000, 30)])
def test_rows_of_a_step(tmp_path, serve, step, at):
    for each in (10, 20, 30):
        write(tmp_path, each, [(1, 0, "a", each, "ok"), (0, 2, "b", float("nan"), "too few")])
    asked = {"run": "r", "table": "scores"} | ({} if step is None else {"step": step})
    told = ask(serve(), "/api/rows", **asked)
    assert (told["table"], told["run"], told["step"]) == ("scores", "r", at)
    assert told["steps"] == [10, 20, 30]
    assert told["columns"] == {
        "layer": [1, 0],
        "head": [0, 2],
        "kind": ["a", "b"],
        "score": [at, None],
        "score_stderr": [0.125, 0.125],
        "score_null": [0.5, 0.25],
        "score_null_sd": [0.0625, 0.0625],
        "bare": [0, 1],
        "word": ['a "b"\n', None],
        "n": [16, 16],
        "validity": ["ok", "too few"],
    }


def test_rows_of_some_fields_in_every_format(tmp_path, serve):
    write(tmp_path, 1, [(1, 0, "a", 2.0, "ok"), (0, 2, "b", 3.0, "ok")])
    service, asked = serve(), {"run": "r", "table": "scores", "field": ["all", "word"]}
    rows = ask(service, "/api/rows", **asked, format="json")
    assert rows[0] == {
        "layer": 1,
        "head": 0,
        "kind": "a",
        "word": 'a "b"\n',
        "all": [1.0, 0.0],
        "n": 16,
        "validity": "ok",
    }
    columns = ask(service, "/api/rows", **asked)["columns"]
    assert {name: [row[name] for row in rows] for name in rows[0]} == columns
    lines = list(csv.DictReader(io.StringIO(text(service, "/api/rows", **asked, format="csv"))))
    assert [json.loads(line["all"]) for line in lines] == columns["all"]
    assert [line["word"] or None for line in lines] == columns["word"]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("run=r&table=scores&step=5", "no measurement at or before 5"),
        ("run=r&table=scores&step=x", "whole number"),
        ("run=r&table=scores&field=scor", "did you mean 'score'"),
        ("run=r&table=attempts", "unknown table"),
        ("run=r", "no table="),
    ],
)
def test_rows_that_there_are_not(tmp_path, serve, query, told):
    write(tmp_path, 10, [(1, 0, "a", 2.0, "ok")])
    code, answer = refused(serve(), f"/api/rows?{query}")
    assert code == 400
    assert told in answer["error"]


def test_changes_lie_on_every_axis(tmp_path, serve):
    record(tmp_path, 0, 100, 200)
    when = moment(200)
    said = [notice("provisional", 200, 50), notice("confirmed", 200, 500, "other")]
    reading = table.reading(said, when)
    ParquetSink(tmp_path, "r").write(Measurement(moment=when, readings=(reading,)))
    service = serve()
    for axis, began in (
        ("step", 50.0),
        ("tokens", 5_000.0),
        ("time", START.timestamp() + 50),
    ):
        first, second = ask(service, "/api/transitions", run="r", axis=axis)
        assert (first["run"], first["series"], first["state"]) == ("r", "number", "provisional")
        assert first["began"] == 50
        assert first["at"]["began"] == pytest.approx(began)
        assert first["at"]["onset"] is None
        # Beyond what was measured nobody knows the tokens.
        assert second["at"]["began"] == (500 if axis == "step" else None)
    assert refused(service, "/api/transitions", run="r", axis="x")[0] == 400


def test_changes_of_several_runs_and_of_none(tmp_path, serve):
    for run in "ab":
        record(tmp_path, 1, run=run)
        when = moment(1, run=run)
        reading = table.reading([notice("provisional", 1, 1)], when)
        ParquetSink(tmp_path, run).write(Measurement(moment=when, readings=(reading,)))
    record(tmp_path, 1, run="c")
    told = ask(serve(), "/api/transitions", run=["a", "b", "c"])
    assert [row["run"] for row in told] == ["a", "b"]
