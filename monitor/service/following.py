"""Following the runs under a folder, whoever writes them.

Folders and files are only ever taken from listings, never made from what a request says, and links
are not followed: nothing outside the root can be named.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from monitor.record import METADATA_KEY, Dim, Field, ProbeSpec, is_ours

_log = logging.getLogger("phasewatch")

# A file may appear within the tick of the clock in which its folder was listed.
_TICK_NS = 2_000_000_000

# Tables that do not count steps.
NOT_BY_STEP = ("attempts", "stimuli")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a table. Files are replaced and never changed: `stamp` differs if it was."""

    path: Path
    number: int
    stamp: tuple[int, int, int]


class UnknownRunError(LookupError):
    """Its name, and those of the runs that there are."""


class Folder:
    """The tables under `root`, as they are now.

    `kept` bounds the bytes that are remembered of files that were read whole.
    """

    def __init__(self, root: Path, *, kept: int = 128 << 20) -> None:
        self.root = root
        self._kept_most, self._kept_bytes = kept, 0
        self._listed: dict[Path, tuple[int, list[StoredFile]]] = {}
        self._read: OrderedDict[tuple[StoredFile, bool], pa.Table | None] = OrderedDict()
        self._said: set[StoredFile] = set()
        self._steps: dict[str, tuple[dict[str, list[StoredFile]], dict[int, frozenset[str]]]] = {}
        self._lock = threading.RLock()

    def runs(self) -> dict[str, dict[str, list[StoredFile]]]:
        """By run and table, the files in order of their numbers."""
        by_run: dict[str, dict[str, list[StoredFile]]] = {}
        for table, folders in self._folders().items():
            for run, folder in folders.items():
                if files := self._files(folder):
                    by_run.setdefault(run, {})[table] = files
        return by_run

    def of_run(self, run: str) -> dict[str, list[StoredFile]]:
        """By table, the files of one run. Raises `UnknownRunError` where there is no such run."""
        folders = self._folders()
        found = {
            table: files
            for table, of_table in folders.items()
            if run in of_table and (files := self._files(of_table[run]))
        }
        if not found:
            known = sorted({run for of_table in folders.values() for run in of_table})
            raise UnknownRunError(run, known)
        return found

    def steps(self, run: str, of_run: Mapping[str, list[StoredFile]]) -> dict[int, frozenset[str]]:
        """By measured step, the tables of a run (as of `of_run`) that have it, in order."""
        lists = {table: files for table, files in of_run.items() if table not in NOT_BY_STEP}
        known, steps = self._steps.get(run, ({}, {}))
        # What is listed only once is the same list.
        if known.keys() == lists.keys() and all(known[t] is files for t, files in lists.items()):
            return steps
        tables: dict[int, list[str]] = {}
        for table, files in lists.items():
            for file in files:
                tables.setdefault(file.number, []).append(table)
        steps = {step: frozenset(tables[step]) for step in sorted(tables)}
        self._steps[run] = (lists, steps)
        return steps

    def schema(self, file: StoredFile) -> pa.Schema | None:
        """The columns of a file, with what is declared of them; None as of `load`."""
        rows = self._remembered(file, whole=False)
        return None if rows is None else rows.schema

    def read(self, file: StoredFile) -> pa.Table | None:
        """All of a file, remembered; None as of `load`."""
        return self._remembered(file, whole=True)

    def load(self, file: StoredFile, columns: Sequence[str] | None = None) -> pa.Table | None:
        """These columns of a file, as far as it has them.

        None where the file is gone or none of ours, which is said once.
        """
        try:
            # Few words for many rows: they are told apart by their numbers.
            words = [c for c in columns or () if c == "validity"]
            stored = pq.ParquetFile(file.path, read_dictionary=words)
            there = stored.schema_arrow
            if not is_ours(there):
                raise ValueError("phasewatch did not write it")
            wanted = None if columns is None else [c for c in columns if c in there.names]
            return stored.read(wanted, use_threads=False)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            with self._lock:
                new = file not in self._said
                self._said.add(file)
                self._listed.pop(file.path.parent, None)
            if new:
                _log.warning("%s is left out: %s", file.path, error)
            return None

    def _remembered(self, file: StoredFile, *, whole: bool) -> pa.Table | None:
        key = (file, whole)
        with self._lock:
            if key in self._read:
                self._read.move_to_end(key)
                return self._read[key]
        table = self.load(file, None if whole else ())
        with self._lock:
            if key not in self._read:
                self._read[key] = table
                self._kept_bytes += _bytes(table)
                while self._kept_bytes > self._kept_most:
                    self._kept_bytes -= _bytes(self._read.popitem(last=False)[1])
        return table

    def _folders(self) -> dict[str, dict[str, Path]]:
        """By table and run, the folder."""
        return {
            table.name: {
                run.name.removeprefix("run="): run
                for run in _folders(table)
                if run.name.startswith("run=")
            }
            for table in _folders(self.root)
            if not table.name.startswith(("_", "."))
        }

    def _files(self, folder: Path) -> list[StoredFile]:
        try:
            changed = folder.stat().st_mtime_ns
            with self._lock:
                known = self._listed.get(folder)
                if known is not None and known[0] == changed:
                    return known[1]
            now = time.time_ns()
            with os.scandir(folder) as entries:
                files = [
                    StoredFile(Path(entry.path), int(entry.name[: -len(".parquet")]), _stamp(entry))
                    for entry in entries
                    if entry.name.endswith(".parquet")
                    and entry.name[: -len(".parquet")].isdecimal()
                    and entry.is_file(follow_symlinks=False)
                ]
        except OSError:
            return []
        files.sort(key=lambda file: file.number)
        with self._lock:
            # What cannot be read may still be growing where it lies.
            if now - changed > _TICK_NS and self._said.isdisjoint(files):
                self._listed[folder] = (changed, files)
        return files


def spec_of(schema: pa.Schema) -> ProbeSpec | None:
    """The declaration of the probe that measured a table, or None where none did."""
    return _spec(schema.metadata[METADATA_KEY])


@lru_cache(maxsize=1_000)
def _spec(metadata: bytes) -> ProbeSpec | None:
    told = json.loads(metadata).get("probe")
    if told is None:
        return None
    told["dims"] = tuple(Dim(**dim) for dim in told["dims"])
    told["fields"] = tuple(Field(**field) for field in told["fields"])
    return ProbeSpec(**told)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _stamp(entry: os.DirEntry[str]) -> tuple[int, int, int]:
    stat = entry.stat(follow_symlinks=False)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _bytes(table: pa.Table | None) -> int:
    # Objects of Python cost something as well.
    return 2_000 + (0 if table is None else table.nbytes)
