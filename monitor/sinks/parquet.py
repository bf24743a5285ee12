"""The tables of one run on disk: one Parquet file a table and step.

    <root>/<table>/run=<run>/<step, 12 digits>.parquet     what holds now, and nothing else
    <root>/_superseded/<table>/run=<run>/...               what a restart measured anew

A file appears whole or not at all (temporary file, fsync, rename, fsync of the folder), so a reader
or a kill at any moment finds only complete tables. Nothing is ever deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from monitor.names import check_run_name
from monitor.record import Measurement, is_ours
from monitor.replacing import ABANDONED, replacing

_log = logging.getLogger("phasewatch")

SUPERSEDED = "_superseded"

# Tables that do not count steps: a restart adds to them or replaces them as a whole.
_NOT_BY_STEP = ("attempts", "stimuli")

# A full disk may recover; what waits for it must not fill the memory instead.
_MOST_WAITING = 1_000


class ParquetSink:
    """Writes one run's tables under `root`.

    Raises `ValueError` where the run's name cannot name a folder or where the root holds Parquet
    files of something else, and `OSError` where it cannot be written.
    """

    def __init__(self, root: str | Path, run: str) -> None:
        self.root = Path(root)
        self.run = check_run_name(run)
        self._waiting: deque[tuple[str, int, pa.Table]] = deque(maxlen=_MOST_WAITING)
        check_root(self.root)

    def write(self, measurement: Measurement) -> None:
        """Writes every reading, and the failures, to their tables.

        What cannot be written now is kept and tried again with the next measurement.
        """
        step = measurement.moment.step
        new = [(r.spec.name, step, r.table) for r in measurement.readings]
        if measurement.failures:
            new.append(("failures", step, measurement.failure_table()))
        if len(self._waiting) + len(new) > _MOST_WAITING:
            _log.warning("too much waits to be written to %s: the oldest is dropped", self.root)
        self._waiting += new
        self._write_waiting()

    def close(self) -> None:
        """Writes what still waits; raises `OSError`, which says what, where that cannot be done."""
        try:
            self._write_waiting()
        except Exception as error:
            steps = sorted({number for _, number, _ in self._waiting})
            raise OSError(
                f"{len(self._waiting)} files of steps {steps[0]} to {steps[-1]} of run {self.run} "
                f"were not written: {error}"
            ) from error

    def put(self, table: str, number: int, rows: pa.Table, *, keep: bool = True) -> None:
        """Writes one file of a table; one already there is set aside first, unless not to keep."""
        path = self._folder(table) / f"{number:012d}.parquet"
        _make_folder(path.parent)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                # Floats hardly repeat: a dictionary of them would only be a second copy.
                dictionary = [f.name for f in rows.schema if not pa.types.is_floating(f.type)]
                pq.write_table(rows, file, compression="zstd", use_dictionary=dictionary)
                file.flush()
                os.fsync(file.fileno())
            if keep and path.exists():
                self._set_aside(path)
        _sync_folder(path.parent)

    @property
    def superseded(self) -> Path:
        """The folder of what restarts measured anew."""
        return self.root / SUPERSEDED

    def stimuli(self, after: int) -> pa.Table | None:
        """The stored stimuli of this run, or None where nothing is measured up to step `after`."""
        path = self._folder("stimuli") / f"{0:012d}.parquet"
        goes_on = any(step <= after for step, _ in self._by_step())
        return pq.ParquetFile(path).read() if goes_on and path.exists() else None

    def next_attempt(self) -> int:
        """One more than the attempts recorded so far."""
        return 1 + max((number for number, _ in _numbered(self._folder("attempts"))), default=0)

    def supersede(self, after: int) -> int:
        """Sets aside all that was measured beyond step `after`, and returns how many files."""
        for abandoned in self.root.glob(f"*/run={self.run}/{ABANDONED}"):
            abandoned.unlink()
        old = [path for step, path in self._by_step() if step > after]
        for path in old:
            self._set_aside(path)
            path.unlink()
        for folder in {path.parent for path in old}:
            _sync_folder(folder)
        return len(old)

    def _by_step(self) -> Iterator[tuple[int, Path]]:
        for folder in self.root.iterdir():
            if folder.name not in (*_NOT_BY_STEP, SUPERSEDED):
                yield from _numbered(self._folder(folder.name))

    def _folder(self, table: str) -> Path:
        return self.root / table / f"run={self.run}"

    def _write_waiting(self) -> None:
        errors = []
        for _ in range(len(self._waiting)):
            try:
                self.put(*self._waiting[0])
            except Exception as error:
                # Its turn comes again; the others need not wait for it.
                self._waiting.rotate(-1)
                errors.append(error)
            else:
                self._waiting.popleft()
        if errors:
            raise errors[0]

    def _set_aside(self, path: Path) -> None:
        """Gives a file a second name under the superseded ones; the first stays until replaced."""
        folder = self.superseded / path.parent.relative_to(self.root)
        _make_folder(folder)
        times = 1
        while (aside := folder / f"{path.stem}.{times}.parquet").exists():
            times += 1
        try:
            os.link(path, aside)
        except OSError:
            # Some file systems have no hard links.
            shutil.copy2(path, aside)
        _sync_folder(folder)


def check_root(root: Path) -> None:
    """Makes the folder `root` if need be.

    Raises `OSError` where it cannot be written, and `ValueError` where it holds somebody else's
    Parquet files.
    """
    try:
        _make_folder(root)
        if foreign := _foreign_file(root):
            raise ValueError(
                f"root {root} holds Parquet files that phasewatch did not write, such as "
                f"{foreign}: choose an empty folder, or one that phasewatch made, with root="
            )
        trial = root / f".{os.getpid()}.tmp"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise type(error)(
            error.errno,
            f"root {root} cannot be written ({error.strerror}): choose another folder with root=",
        ) from error


def _foreign_file(root: Path) -> Path | None:
    """A Parquet file in or under `root` that phasewatch did not write, or None.

    One file a table and run is looked at: enough to tell a folder of somebody else's.
    """
    for folder in (root, *root.glob("*/"), *root.glob("*/run=*/")):
        if folder.name != SUPERSEDED and folder.is_dir():
            path = next(folder.glob("*.parquet"), None)
            if path is not None and not _is_ours(path):
                return path
    return None


def _is_ours(path: Path) -> bool:
    try:
        return is_ours(pq.read_schema(path))
    except (pa.ArrowInvalid, OSError):
        return False


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    return [(int(path.stem), path) for path in folder.glob("*.parquet") if path.stem.isdecimal()]


def _make_folder(folder: Path) -> None:
    """Makes a folder, and makes the fact that it exists survive a crash."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync_folder(made.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
