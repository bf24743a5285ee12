"""What measuring costs: a monitor keeps count of it, and the `attempts` table says it."""

import errno
import os
import time
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest

import monitor
from monitor import monitoring
from tests.recorded import steps

COST = ["measurements", "measured_seconds", "elapsed_seconds"]


class SlowSink:
    """Takes its time."""

    def write(self, measurement):
        time.sleep(0.05)

    def close(self):
        pass


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(monitoring, "_COST_WRITTEN_EVERY", 0)


def test_it_is_summed_with_all_that_belongs_to_it(tmp_path, model, start, at_once):
    one = start(tmp_path, sinks=[SlowSink()])
    assert (one.measurements, one.measured_seconds, one.last_seconds) == (0, 0.0, None)
    one.prepare(model, 0)
    assert (one.measurements, one.measured_seconds, one.last_seconds) == (0, 0.0, None)
    total = 0.0
    for step in range(3):
        begun = time.perf_counter()
        one.measure(model, step=step)
        elapsed = time.perf_counter() - begun
        assert 0.05 <= one.last_seconds <= elapsed < one.last_seconds + 0.05
        total += one.last_seconds
        assert one.measured_seconds == pytest.approx(total)
    assert one.measurements == 3


def test_what_comes_before_training_is_no_part_of_it(tmp_path, model, start):
    one = start(tmp_path)
    begun = time.perf_counter()
    one.measure(model, step=0)
    first = time.perf_counter() - begun
    # It tries the model, asks git, and makes folders besides.
    assert one.last_seconds < 0.9 * first


def test_the_attempt_says_it_and_stays_one_row(tmp_path, model, start, at_once):
    one = start(tmp_path)
    one.prepare(model, 0)
    before = monitor.read(tmp_path, "attempts")
    assert before[COST].values.tolist() == [[0, 0.0, 0.0]]
    for count in range(1, 4):
        one.measure(model, step=count)
        (row,) = monitor.read(tmp_path, "attempts")[COST].to_dict("records")
        assert row["measurements"] == count
        # Without the writing of this very row.
        assert 0 < row["measured_seconds"] < one.measured_seconds
        assert row["measured_seconds"] <= row["elapsed_seconds"]
    after = monitor.read(tmp_path, "attempts")
    assert after.drop(columns=COST).equals(before.drop(columns=COST))
    assert not (tmp_path / "_superseded").exists()


def test_it_is_written_now_and_then_and_at_the_end(tmp_path, model, start, monkeypatch):
    one = start(tmp_path)
    for step in range(3):
        one.measure(model, step=step)
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [0]
    later = time.perf_counter() + 20
    monkeypatch.setattr(time, "perf_counter", lambda: later)
    one.measure(model, step=3)
    monkeypatch.undo()
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [4]
    assert monitor.read(tmp_path, "attempts")["ended"].isna().all()
    one.measure(model, step=4)
    time.sleep(0.1)
    one.close()
    (row,) = monitor.read(tmp_path, "attempts").to_dict("records")
    assert row["measurements"] == 5
    assert 0 <= (datetime.now(UTC) - row["ended"]).total_seconds() < 5
    assert row["measured_seconds"] == pytest.approx(one.measured_seconds)
    assert row["elapsed_seconds"] > 0.1


def test_every_attempt_has_its_own(tmp_path, model, start):
    for attempt, count in ((1, 3), (2, 2)):
        one = start(tmp_path)
        for step in range(count):
            one.measure(model, step=10 * attempt + step)
        one.close()
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [3, 2]


def test_a_disk_that_is_full_for_a_while(tmp_path, model, start, at_once, monkeypatch):
    one = start(tmp_path)
    one.measure(model, step=0)
    put = type(one._store).put

    def full(self, table, *rest, **more):
        if table == "attempts":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, table, *rest, **more)

    monkeypatch.setattr(type(one._store), "put", full)
    assert one.measure(model, step=1).failures == ()
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [1]
    monkeypatch.undo()
    one.close()
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [2]
    assert steps(tmp_path) == [0, 1]


def test_a_crash_while_it_is_written_leaves_the_row_before(
    tmp_path, model, start, at_once, monkeypatch
):
    one = start(tmp_path)
    one.measure(model, step=0)

    def crash(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        one._write_cost()
    monkeypatch.undo()
    assert monitor.read(tmp_path, "attempts")["measurements"].tolist() == [1]


def test_attempts_from_before_it_was_counted(tmp_path, model, start):
    one = start(tmp_path)
    one.measure(model, step=0)
    one.close()
    path = tmp_path / "attempts/run=r/000000000001.parquet"
    pq.write_table(pq.ParquetFile(path).read().drop_columns(COST), path)
    again = start(tmp_path)
    again.measure(model, step=1)
    again.close()
    frame = monitor.read(tmp_path, "attempts")
    assert frame["measurements"].isna().tolist() == [True, False]
    counted = monitor.connect(tmp_path).sql("SELECT max(measurements) FROM attempts")
    assert counted.fetchall() == [(1,)]
