"""Whatever is killed or fails whenever, a file of the Parquet sink is whole or absent, and nothing
is lost.
"""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import monitor
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import heads, measurement, moment
from tests.monitor.sinks.stored import files, scores

REPOSITORY = Path(__file__).parents[3]

# Kills


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


# Starts writers one after the other and kills each at a random moment: as many as are wanted, and
# on until one was killed while it wrote a file. Each begins an attempt like a restarted training:
# it sets aside the last few steps and measures them again. What a writer was promised to be
# stored, it says in a file.
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
for killed in range(10 * writers):
    if killed >= writers and any(root.rglob("*.tmp")):
        break
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
    # One table that cannot be written does not hold up the others.
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1, 2, 3]
    folder.unlink()
    away.rename(folder)
    sink.write(measurement(4))
    assert scores(tmp_path) == {1: {1.01}, 2: {2.01}, 3: {3.01}, 4: {4.01}}
    assert monitor.read(tmp_path, "losses")["step"].tolist() == [1, 2, 3, 4]
    assert not sink.superseded.exists()


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
