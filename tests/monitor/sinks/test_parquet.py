"""The Parquet sink: where files lie, that a file is whole or absent whatever is killed whenever,
that nothing is lost, and that any Parquet reader gets each row once.
"""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import monitor
from monitor.record import STIMULI
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import HEADS, heads, measurement, moment

REPOSITORY = Path(__file__).parents[3]


def files(root: Path) -> list[str]:
    """Every file below `root`, Parquet or not."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def scores(root: Path) -> dict[int, set[float]]:
    """The scores of each step, rounded."""
    frame = monitor.read(root, "heads")
    return {
        int(step): {round(float(score), 2) for score in rows["score"]}
        for step, rows in frame.groupby("step")
    }


def stimuli_table() -> pa.Table:
    row = {"stimulus": "repeated", "sequence": 0, "period": 2, "token_ids": [0, 1, 2, 1, 2]}
    return pa.Table.from_pylist([row], schema=STIMULI)


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


def test_a_relative_root_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ParquetSink("runs", "r").write(measurement(1))
    assert (tmp_path / "runs/heads/run=r/000000000001.parquet").is_file()


@pytest.mark.parametrize("run", ["", "..", "a/b", "ä"])
def test_a_run_that_cannot_name_a_folder_is_refused(tmp_path, run):
    with pytest.raises(ValueError, match="run name"):
        ParquetSink(tmp_path / "runs", run)
    assert files(tmp_path) == []


def test_opening_leaves_nothing_behind(tmp_path):
    ParquetSink(tmp_path / "runs", "r").close()
    assert files(tmp_path) == []


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


# Superseding


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


def test_the_same_step_again_keeps_the_earlier_file(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(5, attempt=1))
    sink.write(measurement(5, attempt=2))
    assert scores(tmp_path) == {5: {5.02}}
    aside = pq.ParquetFile(tmp_path / "_superseded/heads/run=r/000000000005.1.parquet").read()
    assert aside["attempt"][0].as_py() == 1


def test_where_the_file_system_has_no_hard_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(5, attempt=1))
    sink.write(measurement(5, attempt=2))
    aside = pq.ParquetFile(tmp_path / "_superseded/heads/run=r/000000000005.1.parquet").read()
    assert aside["attempt"][0].as_py() == 1
    assert scores(tmp_path) == {5: {5.02}}


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


# Atomicity


@pytest.fixture
def disk(monkeypatch):
    """What is done to the disk, in order: fsync (inode, size), replace and unlink (paths)."""
    events = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def watched_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append(("fsync", status.st_ino, status.st_size))
        fsync(descriptor)

    def watched_replace(source, target):
        events.append(("replace", Path(source), Path(target)))
        replace(source, target)

    def watched_unlink(path, **more):
        events.append(("unlink", Path(path)))
        unlink(path, **more)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "unlink", watched_unlink)
    return events


def synced(events) -> set[int]:
    return {event[1] for event in events if event[0] == "fsync"}


def test_a_file_is_on_disk_before_it_has_its_name_and_its_folder_after(tmp_path, disk):
    sink = ParquetSink(tmp_path, "r")
    disk.clear()
    sink.put("heads", 5, heads(moment(5)).table)
    path = tmp_path / "heads/run=r/000000000005.parquet"
    ((renamed, source, target),) = [(n, *e[1:]) for n, e in enumerate(disk) if e[0] == "replace"]
    assert target == path
    assert source.parent == path.parent
    assert source.suffix == ".tmp"
    assert source.name.startswith(".")
    # The whole file, while it had its other name, and the new folders up to the one that was there.
    whole = path.stat()
    assert ("fsync", whole.st_ino, whole.st_size) in disk[:renamed]
    assert {tmp_path.stat().st_ino, (tmp_path / "heads").stat().st_ino} <= synced(disk[:renamed])
    assert path.parent.stat().st_ino in synced(disk[renamed:])


def test_what_is_set_aside_is_on_disk_there_before_it_is_gone_here(tmp_path, disk):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(5))
    disk.clear()
    sink.supersede(0)
    for table in ("heads", "losses"):
        here, there = tmp_path / table / "run=r", tmp_path / "_superseded" / table / "run=r"
        gone = disk.index(("unlink", here / "000000000005.parquet"))
        assert there.stat().st_ino in synced(disk[:gone])
        assert here.stat().st_ino in synced(disk[gone:])


# Starts writers one after the other and kills each at a random moment. Each begins an attempt like
# a restarted training: it sets aside the last few steps and measures them again. What a writer has
# been promised to be stored, it says in a file.
KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import pyarrow as pa
from monitor.sinks import ParquetSink
from monitor.record import ATTEMPTS
from tests.monitor.sinks.fabricated import measurement

root, promised, writers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def write(log, last):
    sink = ParquetSink(root, "r")
    attempt = sink.next_attempt()
    after = max(0, last - 3)
    sink.supersede(after)
    sink.put("attempts", attempt, pa.Table.from_pylist([{"attempt": attempt}], schema=ATTEMPTS))
    os.write(log, f"attempt {attempt} {after}\\n".encode())
    step = after
    while True:
        step += 1
        sink.write(measurement(step, attempt=attempt))
        os.write(log, f"{step} {attempt}\\n".encode())

chance = random.Random(0)
last = 0
for _ in range(writers):
    log = os.open(promised, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if child == 0:
        write(log, last)
    os.close(log)
    time.sleep(chance.choice((0.02, 0.2)) * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lines = [line.split() for line in promised.read_text().splitlines()]
    if lines and lines[-1][0] != "attempt":
        last = int(lines[-1][0])
"""


def test_writers_killed_at_any_moment_lose_nothing_and_leave_nothing_broken(tmp_path):
    root, promised = tmp_path / "runs", tmp_path / "promised"
    command = [sys.executable, "-c", KILLED_WRITERS, root, promised, "60"]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    stored = [tuple(line.split()) for line in promised.read_text().splitlines()]
    attempts = [int(words[1]) for words in stored if words[0] == "attempt"]
    written = {(int(words[0]), int(words[1])) for words in stored if words[0] != "attempt"}
    # The kills fell where they can tell something: into writing, and at different places of it.
    assert len(attempts) > 20
    assert len(written) > 60
    assert list(root.rglob("*.tmp")), "no writer was killed while it wrote a file"

    last = ParquetSink(root, "r")
    last.supersede(max(step for step, _ in written))

    for path in root.rglob("*.parquet"):
        assert pq.ParquetFile(path).read().num_rows in (1, 4), path
    kept = set()
    for path in root.glob("**/heads/run=r/*.parquet"):
        table = pq.ParquetFile(path).read()
        step, attempt = table["step"][0].as_py(), table["attempt"][0].as_py()
        assert table["score"][0].as_py() == pytest.approx(step + attempt / 100, abs=1e-4)
        kept.add((step, attempt))
    assert written <= kept

    frame = monitor.read(root, "heads")
    assert not frame.duplicated(["step", "layer", "head"]).any()
    # A step that a later attempt measured anew, or set aside, is not there from an earlier one.
    assert frame["attempt"].is_monotonic_increasing
    assert monitor.read(root, "attempts")["attempt"].is_unique
    assert set(attempts) <= set(monitor.read(root, "attempts")["attempt"])


# Failures


def test_what_cannot_be_written_waits_and_is_written_once(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(1))
    folder, away = tmp_path / "heads", tmp_path.with_name("away")
    folder.rename(away)
    folder.write_text("in the way")
    for step in (2, 3):
        with pytest.raises(OSError, match="heads"):
            sink.write(measurement(step))
    folder.unlink()
    away.rename(folder)
    sink.write(measurement(4))
    assert scores(tmp_path) == {1: {1.01}, 2: {2.01}, 3: {3.01}, 4: {4.01}}
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1, 2, 3, 4]
    assert not sink.superseded.exists()


def test_one_table_that_cannot_be_written_does_not_hold_up_the_others(tmp_path):
    sink = ParquetSink(tmp_path, "r")
    (tmp_path / "heads").write_text("in the way")
    for step in (1, 2):
        with pytest.raises(OSError, match="heads"):
            sink.write(measurement(step))
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1, 2]


def test_a_full_disk_leaves_no_partial_file_and_loses_nothing(tmp_path, monkeypatch):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(1))
    before = files(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            sink.write(measurement(step))
    with pytest.raises(OSError, match="No space left"):
        sink.close()
    assert files(tmp_path) == before
    monkeypatch.undo()
    sink.close()
    assert scores(tmp_path) == {1: {1.01}, 2: {2.01}, 3: {3.01}}
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1, 2, 3]
    assert not sink.superseded.exists()


def test_a_failure_after_the_rename_does_not_make_rows_twice(tmp_path, monkeypatch):
    sink = ParquetSink(tmp_path, "r")
    sink.write(measurement(1))
    fsync = os.fsync

    def no_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    with pytest.raises(OSError, match="Input/output"):
        sink.write(measurement(2))
    monkeypatch.undo()
    sink.close()
    assert scores(tmp_path) == {1: {1.01}, 2: {2.01}}
    frame = monitor.read(tmp_path, "heads")
    assert not frame.duplicated(["step", "layer", "head"]).any()


# Roots that are refused


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


def test_the_declaration_can_be_read_without_phasewatch(tmp_path):
    ParquetSink(tmp_path, "r").write(measurement(1))
    metadata = pq.read_schema(tmp_path / "heads/run=r/000000000001.parquet").metadata
    declared = json.loads(metadata[b"phasewatch"])["probe"]
    assert [field["name"] for field in declared["fields"]] == ["score", "entropy"]
    assert [dim["name"] for dim in declared["dims"]] == ["layer", "head"]
