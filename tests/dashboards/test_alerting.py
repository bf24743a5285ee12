"""A real Prometheus and a real Alertmanager with the configurations that are shipped: runs are
found by their files, and let go when they end, what changes is said, and not said twice.
"""

import json
import urllib.request
from dataclasses import replace

import pytest

import dashboards
from monitor.detection import table
from monitor.detection.noticing import Noticing
from monitor.recorder import Recorder
from tests.dashboards.running import recorder, shipped
from tests.monitor.detection.made_up import NUMBER, rising
from tests.programs import Server, free_port, program, started, wait_for


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
