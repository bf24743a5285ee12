"""A real Prometheus and a real Alertmanager with the configurations that are shipped: runs are
found by their files, and let go when they end, what changes is said, and not said twice.
"""

import json
import shutil
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import dashboards
from monitor.detection import table
from monitor.detection.noticing import Noticing
from monitor.recorder import Recorder
from monitor.sinks import ParquetSink
from tests.monitor.detection.made_up import NUMBER, rising
from tests.programs import Server, free_port, program, started, wait_for


@contextmanager
def shipped(folder: Path):
    """A Prometheus with a copy of the shipped files beside `folder/runs`, only faster."""
    home = folder / "dashboards"
    shutil.copytree(Path(dashboards.__file__).parent, home)
    config = home / "prometheus.yml"
    text = config.read_text()
    for slow, fast in (
        ("scrape_interval: 5s", "scrape_interval: 200ms\n  scrape_timeout: 200ms"),
        ("evaluation_interval: 15s", "evaluation_interval: 200ms"),
        ("refresh_interval: 10s", "refresh_interval: 1s"),
    ):
        assert slow in text
        text = text.replace(slow, fast)
    config.write_text(text)
    port = free_port()
    command = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with (folder / "log").open("w") as log, started(command, stdout=log, stderr=log):
        server = Server(f"http://127.0.0.1:{port}")

        def ready():
            with urllib.request.urlopen(f"{server.url}/-/ready", timeout=5) as answer:
                return answer.status == 200

        wait_for(ready, "prometheus to be ready")
        yield server


def recorder(root: Path, run: str) -> Recorder:
    made = Recorder(ParquetSink(root, run), ())
    made.begin(run, address="127.0.0.1", port=0, info={})
    return made


def replayed(to: Recorder):
    """Replays a rise to a recorder, and yields what was said of it."""
    noticing = Noticing((NUMBER,))
    for measurement in rising():
        notices = noticing.notice(measurement).notices
        said = table.reading(notices, measurement.moment)
        more = (said,) if notices else ()
        whole = replace(measurement, readings=(*measurement.readings, *more))
        assert not to.record(whole, then=lambda: ()).failures
        yield from (notice.event.state for notice in notices)


def firing(server: Server, name: str) -> list[dict]:
    return [
        alert
        for alert in server.ask("alerts")["alerts"]
        if alert["labels"]["alertname"] == name and alert["state"] == "firing"
    ]


def up(server: Server) -> dict[str, float]:
    found = server.ask("query", query="up")["result"]
    return {each["metric"]["run"]: float(each["value"][1]) for each in found}


@pytest.mark.timeout(180)
def test_a_transition_that_is_replayed_fires(tmp_path):
    root = tmp_path / "runs"
    writing = recorder(root, "r")
    # That of a process that was killed: its port is another run's by now.
    target = root / "_targets" / "r.json"
    stale = target.with_name("killed.json")
    stale.write_text(target.read_text().replace('"r"', '"killed"'))
    assert json.loads(stale.read_text())[0]["labels"] == {"run": "killed"}
    try:
        with shipped(tmp_path) as server:
            wait_for(lambda: up(server) == {"r": 1.0, "killed": 1.0}, "both targets")
            saying = replayed(writing)
            for state in ("provisional", "confirmed"):
                name = f"PhasewatchTransition{state.capitalize()}"
                assert not firing(server, name)
                assert next(saying) == state
                (alert,) = wait_for(lambda name=name: firing(server, name), name)
                assert alert["labels"]["run"] == "r"
                assert alert["labels"]["series"] == NUMBER.name
                assert alert["annotations"]["summary"].startswith(f"Run r: {NUMBER.name} ")
            wait_for(lambda: not firing(server, "PhasewatchTransitionProvisional"), "its end")
            found = server.ask("query", query='{__name__=~"phasewatch.*"}')["result"]
            assert {each["metric"]["run"] for each in found} == {"r"}
            assert not any("exported_run" in each["metric"] for each in found)
            bad = [
                g for g in server.ask("rules")["groups"] for r in g["rules"] if r["health"] != "ok"
            ]
            assert not bad

            writing.close()
            assert not target.exists()
            wait_for(lambda: "r" not in up(server), "the target to go")
            assert stale.exists()
    finally:
        writing.close()


def test_a_run_that_ends_leaves_another_attempts_file(tmp_path):
    first, second = recorder(tmp_path, "r"), recorder(tmp_path, "r")
    target = tmp_path / "_targets" / "r.json"
    address = json.loads(target.read_text())[0]["targets"]
    assert address == [second.url.removeprefix("http://")]
    assert first.url != second.url
    first.close()
    assert json.loads(target.read_text())[0]["targets"] == address
    second.close()
    assert not list(target.parent.iterdir())


def test_without_a_folder_that_can_be_written_metrics_are_served_all_the_same(tmp_path, caplog):
    (tmp_path / "_targets").write_text("in the way")
    serving = recorder(tmp_path, "r")
    try:
        with urllib.request.urlopen(f"{serving.url}/metrics", timeout=10) as answer:
            assert b"phasewatch_run_info" in answer.read()
        assert f"Prometheus cannot find {serving.url} by itself" in caplog.text
    finally:
        serving.close()


def test_what_is_confirmed_is_not_said_to_be_provisional_as_well(tmp_path):
    port = free_port()
    command = [
        program("prometheus-alertmanager"),
        f"--config.file={dashboards.ALERTMANAGER_CONFIG}",
        f"--storage.path={tmp_path}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    url = f"http://127.0.0.1:{port}/api/v2"
    given = [
        {"labels": {"alertname": f"Phasewatch{name}", "run": run, **more}}
        for name, run, more in (
            ("TransitionConfirmed", "r", {"series": "s"}),
            ("TransitionProvisional", "r", {"series": "s"}),
            ("TransitionProvisional", "r", {"series": "another"}),
            ("TransitionProvisional", "another", {"series": "s"}),
            ("ProcessGone", "r", {}),
            ("TrainingStalled", "r", {}),
            ("TrainingStalled", "another", {}),
        )
    ]
    with (tmp_path / "log").open("w") as log, started(command, stdout=log, stderr=log):

        def ask(path, data=None):
            request = urllib.request.Request(
                f"{url}/{path}", data=data, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.loads(answer.read() or "null")

        wait_for(lambda: ask("status"), "alertmanager to be ready")
        ask("alerts", json.dumps(given).encode())

        def quiet():
            return [a["labels"] for a in ask("alerts") if a["status"]["state"] == "suppressed"]

        # It takes them in one by one, and a moment later.
        wait_for(lambda: len(ask("alerts")) == len(given) and len(quiet()) >= 2, "inhibition")
        assert sorted(quiet(), key=str) == sorted((given[i]["labels"] for i in (1, 5)), key=str)
        groups = ask("alerts/groups")
        assert sorted(group["labels"]["run"] for group in groups) == ["another", "r"]
        assert {group["receiver"]["name"] for group in groups} == {"shown"}
