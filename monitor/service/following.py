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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class Folder:
    """The tables under `root`, as they are now.

    `kept` bounds the bytes that are remembered of what was read.
    """

    def __init__(self, root: Path, *, kept: int = 512 << 20) -> None:
        self.root = root
        self._kept_most, self._kept_bytes = kept, 0
        self._listed: dict[Path, tuple[int, list[StoredFile]]] = {}
        self._read: OrderedDict[tuple[Any, ...], pa.Table | None] = OrderedDict()
        self._said: set[StoredFile] = set()
        self._lock = threading.RLock()

    def tables(self) -> dict[str, dict[str, list[StoredFile]]]:
        """The files of every run of every table, in order of their numbers."""
        with self._lock:
            return {
                table.name: {
                    run.name.removeprefix("run="): files
                    for run in _folders(table)
                    if run.name.startswith("run=") and (files := self._files(run))
                }
                for table in _folders(self.root)
                if not table.name.startswith(("_", "."))
            }

    def read(
        self,
        file: StoredFile,
        what: tuple[Any, ...] = (),
        pick: Callable[[pa.Table], pa.Table] = lambda table: table,
        columns: Sequence[str] | None = None,
    ) -> pa.Table | None:
        """What `pick` takes of a file, remembered under the name `what`.

        None where the file is gone or none of ours, which is said once.
        """
        key = (file.path, file.stamp, *what)
        with self._lock:
            if key in self._read:
                self._read.move_to_end(key)
                return self._read[key]
        table = self._load(file, pick, columns)
        with self._lock:
            if key not in self._read:
                self._read[key] = table
                self._kept_bytes += _bytes(table)
                while self._kept_bytes > self._kept_most:
                    self._kept_bytes -= _bytes(self._read.popitem(last=False)[1])
        return table

    def _load(
        self,
        file: StoredFile,
        pick: Callable[[pa.Table], pa.Table],
        columns: Sequence[str] | None,
    ) -> pa.Table | None:
        try:
            stored = pq.ParquetFile(file.path)
            if not is_ours(stored.schema_arrow):
                raise ValueError("phasewatch did not write it")
            there = (
                None if columns is None else [c for c in columns if c in stored.schema_arrow.names]
            )
            # A table of its own, so that what was picked does not keep the whole file in memory.
            return pick(stored.read(there, use_threads=False)).combine_chunks()
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, ValueError) as error:
            with self._lock:
                new = file not in self._said
                self._said.add(file)
            if new:
                _log.warning("%s is left out: %s", file.path, error)
            return None

    def _files(self, folder: Path) -> list[StoredFile]:
        try:
            changed = folder.stat().st_mtime_ns
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
        if now - changed > _TICK_NS:
            self._listed[folder] = (changed, files)
        return files


def spec_of(table: pa.Table) -> ProbeSpec | None:
    """The declaration of the probe that measured a table, or None where none did."""
    told = json.loads(table.schema.metadata[METADATA_KEY]).get("probe")
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
