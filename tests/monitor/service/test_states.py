"""How runs are doing, and what is said of it while one listens."""

import json
import os
import shutil
import time
import urllib.request
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

from monitor.attempt import attempt_row, with_cost
from monitor.service.events import News
from monitor.sinks import ParquetSink
from tests.monitor.service.served import ask, record
from tests.recorded import page


def attempt(root, *, number=1, run="r", ended=None, told=True):
    """The row of an attempt, as of a version that tells whether it was closed, or of an earlier."""
    row = attempt_row(
        attempt=number, resumed_from=None, seed=3, parameters=7, config={"model": "M"}
    )
    row = with_cost(row, ended=ended)
    ParquetSink(root, run).put("attempts", number, row if told else row.drop_columns(["ended"]))


def aged(root, seconds, table="*"):
    """As if the files of a table had been written so long before."""
    for path in root.glob(f"{table}/run=*/*.parquet"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def state(service):
    (run,) = ask(service, "/api/runs")
    return run["state"], run["guessed"]


def test_a_run_that_was_closed_is_finished_at_once(tmp_path, serve):
    now = datetime.now(UTC)
    attempt(tmp_path)
    record(tmp_path, 1, 2)
    service = serve()
    assert state(service) == ("running", False)
    assert 'phasewatch_run_finished{run="r"} 0.0' in page(service.url)
    attempt(tmp_path, ended=now)
    assert state(service) == ("finished", False)
    assert 'phasewatch_run_finished{run="r"} 1.0' in page(service.url)
    assert datetime.fromisoformat(ask(service, "/api/runs")[0]["ended"]) == now
    attempt(tmp_path, number=2)
    assert state(service) == ("running", False)
    assert ask(service, "/api/runs")[0]["attempts"] == 2


def test_a_run_that_was_not_closed_and_is_quiet_has_stalled(tmp_path, serve):
    record(tmp_path, 1, 2)
    attempt(tmp_path)
    aged(tmp_path, 50)
    assert state(serve()) == ("running", False)
    aged(tmp_path, 50)
    assert state(serve()) == ("stalled", False)


def test_a_slow_run_may_be_quiet_for_longer(tmp_path, serve):
    attempt(tmp_path)
    for step in range(4):
        record(tmp_path, step)
        if step < 3:
            aged(tmp_path, 100)
    aged(tmp_path, 400)
    assert state(serve()) == ("running", False)
    aged(tmp_path, 200)
    assert state(serve()) == ("stalled", False)


@pytest.mark.parametrize(("first", "expected"), [("heads", "finished"), ("attempts", "stalled")])
def test_of_earlier_versions_it_is_guessed(tmp_path, serve, first, expected):
    record(tmp_path, 1, 2)
    attempt(tmp_path, told=False)
    aged(tmp_path, 100)
    aged(tmp_path, 10, table=first)
    if first == "heads":
        aged(tmp_path, 10, table="losses")
    assert state(serve()) == (expected, True)


def test_without_any_attempt(tmp_path, serve):
    record(tmp_path, 1)
    assert state(serve()) == ("running", False)
    aged(tmp_path, 100)
    assert state(serve()) == ("stalled", True)


class Listener:
    """What is said while one listens."""

    def __init__(self, stream):
        self._stream = stream
        assert stream.readline() == b": connected\n"

    def next(self):
        lines = []
        while (line := self._stream.readline().decode().strip()) or not lines:
            if line and not line.startswith(":"):
                lines.append(line)
        kind, told = (line.partition(": ")[2] for line in lines)
        return kind, json.loads(told)


def test_every_measurement_and_every_change_of_state_is_told_once(tmp_path, serve):
    attempt(tmp_path)
    record(tmp_path, 1)
    service = serve()
    with urllib.request.urlopen(f"{service.url}/api/events", timeout=10) as stream:
        listener = Listener(stream)
        record(tmp_path, 2, 3)
        attempt(tmp_path, ended=datetime.now(UTC))
        both = {"run": "r", "tables": ["heads", "losses"]}
        assert listener.next() == ("measurement", both | {"step": 2})
        assert listener.next() == ("measurement", both | {"step": 3})
        assert listener.next() == ("state", {"run": "r", "state": "finished"})
        for table in ("attempts", "heads", "losses"):
            shutil.rmtree(tmp_path / table / "run=r")
        assert listener.next() == ("state", {"run": "r", "state": "gone"})


def seen(state, **tables):
    """Of the run r: steps by the names of their tables, as `a=[1, 2]`."""
    steps = sorted({step for of in tables.values() for step in of})
    by_step = {step: frozenset(t for t, of in tables.items() if step in of) for step in steps}
    return {"r": (state, by_step)}


def told(news, state, **tables):
    events = news.look(seen(state, **tables))
    return [json.loads(event.split("data: ")[1]) for event in events]


def test_a_measurement_is_told_once_its_tables_are_there():
    news = News(seen("running", a=[1]))
    assert told(news, "running", a=[1, 2]) == []
    assert told(news, "running", a=[1, 2], b=[2]) == []
    assert told(news, "running", a=[1, 2], b=[2]) == [{"run": "r", "step": 2, "tables": ["a", "b"]}]
    assert told(news, "running", a=[1, 2], b=[2]) == []
    # What comes late is told by itself.
    assert told(news, "running", a=[1, 2], b=[2], c=[2]) == []
    assert told(news, "running", a=[1, 2], b=[2], c=[2]) == [
        {"run": "r", "step": 2, "tables": ["c"]}
    ]


def test_the_end_is_told_after_what_was_measured():
    news = News(seen("running", a=[1]))
    assert told(news, "finished", a=[1, 2]) == []
    assert told(news, "finished", a=[1, 2]) == [
        {"run": "r", "step": 2, "tables": ["a"]},
        {"run": "r", "state": "finished"},
    ]


def test_what_is_measured_anew_is_told_anew():
    news = News(seen("running", a=[1, 2]))
    assert told(news, "running", a=[1]) == []
    assert told(news, "running", a=[1, 2]) == []
    assert told(news, "running", a=[1, 2]) == [{"run": "r", "step": 2, "tables": ["a"]}]


def test_a_run_that_is_new():
    news = News({})
    assert told(news, "running", a=[1]) == []
    assert told(news, "running", a=[1]) == [
        {"run": "r", "step": 1, "tables": ["a"]},
        {"run": "r", "state": "running"},
    ]


def test_a_run_that_vanishes_while_it_is_served(tmp_path, serve):
    record(tmp_path, 1, 2, run="a")
    record(tmp_path, 1, run="b")
    service, asked = serve(), {"run": ["a", "b"], "table": "heads", "field": "score"}
    assert len(ask(service, "/api/series", **asked)) == 12
    for table in ("heads", "losses"):
        shutil.rmtree(tmp_path / table / "run=a")
    assert [run["run"] for run in ask(service, "/api/runs")] == ["b"]
    assert len(ask(service, "/api/series", **asked | {"run": "b"})) == 4
    record(tmp_path, 7, run="a")
    assert [row["axis"] for row in ask(service, "/api/series", **asked | {"run": "a"})] == [7] * 4


def test_a_file_that_is_still_being_copied(tmp_path, serve):
    record(tmp_path, 1, 2)
    path = tmp_path / "losses" / "run=r" / f"{2:012d}.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    time.sleep(2.1)  # Beyond the tick of the clock in which its folder was changed.
    service, asked = serve(), {"run": "r", "table": "losses", "field": "loss"}
    for _ in range(2):
        assert [row["axis"] for row in ask(service, "/api/series", **asked)] == [1]
    with path.open("ab") as file:
        file.write(whole[len(whole) // 2 :])
    assert pq.read_table(path).num_rows == 1
    assert [row["axis"] for row in ask(service, "/api/series", **asked)] == [1, 2]
