"""The Parquet sink's folder: where files lie, that any Parquet reader gets each row once, and which
roots are refused.
"""

import errno
import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.record import HEAD, LAYER, Field, Measurement, ProbeSpec, Reading
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import HEADS, measurement, moment
from tests.monitor.sinks.stored import files

# Layout


def test_one_file_a_table_and_step(tmp_path):
    sink = ParquetSink(tmp_path / "runs", "my-run")
    sink.write(measurement(0, run="my-run"))
    sink.write(measurement(120, run="my-run", failures=["losses"]))
    sink.close()
    assert files(tmp_path) == [
        "runs/failures/run=my-run/000000000120.parquet",
        "runs/heads/run=my-run/000000000000.parquet",
        "runs/heads/run=my-run/000000000120.parquet",
        "runs/losses/run=my-run/000000000000.parquet",
        "runs/losses/run=my-run/000000000120.parquet",
    ]


def test_a_file_holds_the_reading_with_its_declaration(tmp_path):
    given = measurement(3)
    ParquetSink(tmp_path, "r").write(given)
    stored = pq.ParquetFile(tmp_path / "heads/run=r/000000000003.parquet").read()
    assert stored.equals(given.readings[0].table, check_metadata=False)
    assert stored.schema.metadata[b"phasewatch"] == HEADS.schema.metadata[b"phasewatch"]
    # Which can be read without phasewatch.
    declared = json.loads(stored.schema.metadata[b"phasewatch"])["probe"]
    assert [field["name"] for field in declared["fields"]] == ["score", "entropy"]
    assert [dim["name"] for dim in declared["dims"]] == ["layer", "head"]


def test_a_relative_root_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ParquetSink("runs", "r").write(measurement(1))
    assert (tmp_path / "runs/heads/run=r/000000000001.parquet").is_file()


def test_opening_leaves_nothing_behind(tmp_path):
    ParquetSink(tmp_path / "runs", "r").close()
    assert files(tmp_path) == []


def test_a_file_of_a_large_model_is_small(tmp_path):
    """9,216 heads with 8 fields: hardly more than the numbers, which take 295 kB."""
    rows, chance = 96 * 96, np.random.default_rng(0)
    names = [f"field_{number}" for number in range(8)]
    spec = ProbeSpec(
        name="heads",
        help="h",
        source="s",
        dims=(LAYER, HEAD),
        fields=tuple(Field(name=name, help="h", stderr=False) for name in names),
        needs=(),
    )
    columns = {name: chance.random(rows, dtype=np.float32) for name in names}
    columns |= {"layer": np.repeat(np.arange(96), 96), "head": np.tile(np.arange(96), 96)}
    columns |= {"n": np.full(rows, 16), "validity": ["ok"] * rows}
    reading = Reading.build(spec, moment(7), columns)
    ParquetSink(tmp_path, "r").write(Measurement(moment=moment(7), readings=(reading,)))
    path = tmp_path / "heads/run=r/000000000007.parquet"
    assert path.stat().st_size <= 300_000
    assert pq.ParquetFile(path).read().equals(reading.table)


# Other readers


def test_pandas_and_duckdb_read_each_row_once(tmp_path):
    for run in ("a", "b"):
        first = ParquetSink(tmp_path, run)
        for step in range(6):
            first.write(measurement(step, run=run))
        resumed = ParquetSink(tmp_path, run)
        resumed.supersede(3)
        for step in range(4, 8):
            resumed.write(measurement(step, run=run, attempt=2))
        # The same step again, without superseding: it replaces the row.
        resumed.write(measurement(7, run=run, attempt=2))
    # What a killed writer leaves.
    (tmp_path / "heads/run=a/.000000000009.parquet.1.tmp").write_bytes(b"PAR1")
    expected = sorted(
        (run, step, 1 if step < 4 else 2, layer, head)
        for run in ("a", "b")
        for step in range(8)
        for layer in (0, 1)
        for head in (0, 1)
    )
    keys = ["run", "step", "attempt", "layer", "head"]

    frame = pd.read_parquet(tmp_path / "heads")
    assert sorted(frame[keys].astype({"run": str}).itertuples(index=False, name=None)) == expected

    query = f"""SELECT run, step, attempt, layer, head, score FROM
        read_parquet('{tmp_path}/heads/**/*.parquet', hive_partitioning=true) ORDER BY ALL"""
    with duckdb.connect() as connection:
        rows = connection.execute(query).fetchall()
    assert [row[:5] for row in rows] == expected
    assert all(row[5] == pytest.approx(row[1] + row[2] / 100, abs=1e-5) for row in rows)


# What is refused


@pytest.mark.parametrize("run", ["", "..", "a/b", "ä"])
def test_a_run_that_cannot_name_a_folder_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="run name"):
        ParquetSink(tmp_path / "runs", run)
    assert files(tmp_path) == []


@pytest.mark.parametrize("place", ["data.parquet", "part/0.parquet", "table/run=x/0.parquet"])
def test_a_folder_of_somebody_elses_parquet_files_is_refused(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="Parquet files that phasewatch did not write") as raised:
        ParquetSink(tmp_path, "r")
    assert str(path) in str(raised.value)
    assert "root=" in str(raised.value)
    assert files(tmp_path) == [place]


def test_a_folder_of_files_that_only_look_like_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ValueError, match="did not write"):
        ParquetSink(tmp_path, "r")


def test_a_folder_with_other_files_can_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_text("mine")
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(1))
    assert ParquetSink(tmp_path, "r").supersede(0) == 2
    assert {"notes.txt", "checkpoints/last.ckpt"} <= set(files(tmp_path))


@pytest.mark.parametrize("below", ["", "runs", "deep/er/runs"])
def test_a_root_that_cannot_be_written_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / below
    with pytest.raises(OSError, match=r"cannot be written .*root=") as raised:
        ParquetSink(root, "r")
    assert str(root) in str(raised.value)
    assert raised.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_a_full_disk_is_seen_when_the_root_is_opened(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        ParquetSink(tmp_path, "r")
    assert raised.value.errno == errno.ENOSPC
