"""Attempts in the Parquet sink's folder: what is superseded is set aside and never deleted, and the
next attempt finds what it needs.
"""

import errno
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.record import STIMULI
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import measurement
from tests.monitor.sinks.stored import files, scores


def stimuli_table() -> pa.Table:
    row = {"stimulus": "repeated", "sequence": 0, "period": 2, "token_ids": [0, 1, 2, 1, 2]}
    return pa.Table.from_pylist([row], schema=STIMULI)


def test_what_is_superseded_is_set_aside_and_never_deleted(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    for step in (1, 2, 3):
        sink.write(measurement(step))
    assert ParquetSink(tmp_path, "r").supersede(1) == 4
    assert scores(tmp_path) == {1: {1.01}}
    resumed = ParquetSink(tmp_path, "r")
    resumed.write(measurement(2, attempt=2))
    assert ParquetSink(tmp_path, "r").supersede(1) == 2
    aside = tmp_path / "_superseded/heads/run=r"
    assert resumed.superseded == tmp_path / "_superseded"
    kept = {p.name: pq.ParquetFile(p).read()["attempt"][0].as_py() for p in aside.iterdir()}
    assert kept == {
        "000000000002.1.parquet": 1,
        "000000000002.2.parquet": 2,
        "000000000003.1.parquet": 1,
    }


def test_superseding_spares_other_runs_stimuli_and_attempts(tmp_path):
    for run in ("r", "other"):
        sink = ParquetSink(tmp_path, run)
        sink.put("stimuli", 0, stimuli_table())
        sink.put("attempts", 1, stimuli_table())
        sink.write(measurement(5, run=run))
    before = files(tmp_path)
    ParquetSink(tmp_path, "r").supersede(-1)
    gone = set(before) - set(files(tmp_path))
    assert gone == {f"{table}/run=r/000000000005.parquet" for table in ("heads", "losses")}


def test_superseding_nothing(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(5))
    assert sink.supersede(5) == 0
    assert not sink.superseded.exists()


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_same_step_again_keeps_the_earlier_file(tmp_path, monkeypatch, hard_links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    # Where the file system has none, files are copied.
    if not hard_links:
        monkeypatch.setattr(os, "link", no_links)
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(5, attempt=1))
    sink.write(measurement(5, attempt=2))
    assert scores(tmp_path) == {5: {5.02}}
    aside = pq.ParquetFile(tmp_path / "_superseded/heads/run=r/000000000005.1.parquet").read()
    assert aside["attempt"][0].as_py() == 1


def test_attempts_are_counted_for_each_run(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    assert sink.next_attempt() == 1
    sink.put("attempts", 1, stimuli_table())
    sink.put("attempts", 2, stimuli_table())
    assert ParquetSink(tmp_path, "r").next_attempt() == 3
    assert ParquetSink(tmp_path, "s").next_attempt() == 1


def test_stored_stimuli_come_back_only_where_something_was_measured(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    assert sink.stimuli(100) is None
    sink.put("stimuli", 0, stimuli_table())
    assert sink.stimuli(100) is None
    sink.write(measurement(5))
    assert sink.stimuli(4) is None
    assert sink.stimuli(5).equals(stimuli_table())
    assert ParquetSink(tmp_path, "s").stimuli(100) is None
