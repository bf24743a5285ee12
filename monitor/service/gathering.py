"""The numbers of a table over all of its measurements: what is read of a file is read once.

A file holds one measurement of every series, and who draws a chart asks for all measurements of a
few. So each column that was ever asked for is kept as an array [measurement, series], in the
precision in which it is stored, and only what is new is read from then on.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from monitor.record import Field, ProbeSpec
from monitor.service.following import Folder, StoredFile

Array = np.ndarray[Any, Any]

_ABSENT = -1
# Files are handed to threads in bunches, so that few of them are in memory beside the arrays.
_BUNCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Some series of a field, by measurement: `steps`, `tokens` and `seconds` since the epoch are
    of these, `dims` of the series, and `columns` and `validity` are [measurement, series].

    `validity` counts in `words`, and is -1 where a file has no such series or no such field.
    """

    steps: Array
    tokens: Array
    seconds: Array
    dims: list[tuple[Any, ...]]
    columns: dict[str, Array]
    validity: Array
    words: list[str]


class Gatherer:
    """What was gathered of the tables of all runs: at most `kept` bytes, the least lately asked for
    goes first.
    """

    def __init__(self, folder: Folder, *, kept: int = 1 << 30) -> None:
        self._folder, self._most = folder, kept
        self._tables: OrderedDict[tuple[str, str], _Gathered] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "phasewatch-reading")

    def moments(self, run: str, spec: ProbeSpec, files: list[StoredFile]) -> tuple[Array, ...]:
        """Step, tokens and seconds since the epoch of every measurement of a table."""
        with self._table(run, spec) as gathered:
            gathered.take(files, spec, [])
            return gathered.moments()

    def lines(
        self,
        run: str,
        spec: ProbeSpec,
        files: list[StoredFile],
        field: Field,
        choose: Callable[[list[tuple[Any, ...]], Callable[[], Array]], Sequence[int]],
    ) -> Lines:
        """The series of a field that `choose` picks, in its order.

        It is given the dimensions of all series and what tells how far each has ever been above its
        null, minus infinity for those that were never valid.
        """
        with self._table(run, spec) as gathered:
            gathered.take(files, spec, field.columns)
            if gathered.bytes > self._most:
                gathered.only(field.columns)
            chosen = choose(gathered.dims, lambda: gathered.reached(field))
            return gathered.lines(field, np.array(chosen, dtype=np.int64))

    def close(self) -> None:
        """Ends the threads that read."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _table(self, run: str, spec: ProbeSpec) -> _Gathered:
        with self._lock:
            key = (run, spec.name)
            if key not in self._tables:
                self._tables[key] = _Gathered(self._read)
            self._tables.move_to_end(key)
            while len(self._tables) > 1 and self._bytes() > self._most:
                self._tables.popitem(last=False)
            return self._tables[key]

    def _bytes(self) -> int:
        return sum(gathered.bytes for gathered in self._tables.values())

    def _read(
        self, files: Sequence[StoredFile], columns: Sequence[str]
    ) -> Iterator[pa.Table | None]:
        for first in range(0, len(files), _BUNCH):
            bunch = files[first : first + _BUNCH]
            run = map if len(bunch) < 4 else self._readers.map
            yield from run(lambda file: self._folder.load(file, columns), bunch)


class _Gathered:
    """One table of one run."""

    def __init__(
        self, read: Callable[[Sequence[StoredFile], Sequence[str]], Iterator[pa.Table | None]]
    ) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._names: list[str] = []
        self._forget()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def bytes(self) -> int:
        """Of memory, about."""
        arrays = [*self._columns.values(), self._validity]
        return sum(array.nbytes for array in arrays) + 200 * len(self.dims)

    def take(self, files: list[StoredFile], spec: ProbeSpec, columns: Sequence[str]) -> None:
        """Reads what is not yet known of these columns."""
        names = [dim.name for dim in spec.dims]
        pairs = zip(files, self._files, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if names != self._names:
            self._names = names
            self._forget()
        elif same < len(self._files):
            # Something was replaced or set aside: what came before it stays.
            self._truncate(same)
        for name in columns:
            if name not in self._columns:
                self._columns[name] = np.full(self._validity.shape, np.nan, np.float32)
                self._upto[name] = 0
        self._rows_for(len(files))
        known = {name: self._upto[name] for name in columns}
        # Columns that have come as far are read together.
        stops = sorted({*known.values(), len(self._files), len(files)})
        for first, until in itertools.pairwise(stops):
            lacking = [name for name in columns if known[name] <= first]
            self._take(files[first:until], first, lacking)
        self._upto |= dict.fromkeys(columns, len(files))

    def only(self, columns: Sequence[str]) -> None:
        """Forgets all other columns."""
        for name in self._columns.keys() - set(columns):
            del self._columns[name], self._upto[name]

    def moments(self) -> tuple[Array, ...]:
        """Step, tokens and seconds of every measurement that could be read."""
        there = np.array([layout is not None for layout in self._layouts], dtype=bool)
        steps = np.array([file.number for file in self._files], dtype=np.int64)
        return tuple(a[there] for a in (steps, np.array(self._tokens), np.array(self._seconds)))

    def reached(self, field: Field) -> Array:
        """How far each series has ever been above its null."""
        known, best = self._reached.get(field.name, (0, np.full(0, -np.inf, np.float32)))
        best = np.append(best, np.full(len(self.dims) - len(best), -np.inf, np.float32))
        new = slice(known, len(self._files))
        above = self._columns[field.name][new, : len(best)]
        if field.null:
            above = above - self._columns[f"{field.name}_null"][new, : len(best)]
        fit = (self._validity[new, : len(best)] == self._word("ok")) & ~np.isnan(above)
        if len(above):
            best = np.maximum(best, np.where(fit, above, -np.inf).max(0))
        self._reached[field.name] = (len(self._files), best)
        return best

    def lines(self, field: Field, chosen: Array) -> Lines:
        """Some series of a field, whose columns were taken."""
        count = len(self._files)
        validity = self._validity[:count, chosen]
        lacking = [row for row in self._lacking.get(field.name, ()) if row < count]
        validity[np.array(lacking, dtype=np.int64)] = _ABSENT
        return Lines(
            steps=np.array([file.number for file in self._files], dtype=np.int64),
            tokens=np.array(self._tokens, dtype=np.float64),
            seconds=np.array(self._seconds, dtype=np.float64),
            dims=[self.dims[at] for at in chosen],
            columns={name: self._columns[name][:count, chosen] for name in field.columns},
            validity=validity,
            words=self._words,
        )

    def _forget(self) -> None:
        self.dims: list[tuple[Any, ...]] = []
        self._index: dict[tuple[Any, ...], int] = {}
        self._words: list[str] = []
        self._columns: dict[str, Array] = {}
        self._upto: dict[str, int] = {}
        self._lacking: dict[str, set[int]] = {}
        self._validity = np.full((0, 0), _ABSENT, np.int16)
        self._truncate(0)

    def _truncate(self, count: int) -> None:
        if count == 0:
            self._files: list[StoredFile] = []
            self._tokens: list[float] = []
            self._seconds: list[float] = []
            self._layouts: list[Array | None] = []
        for known in (self._files, self._tokens, self._seconds, self._layouts):
            del known[count:]
        self._last_layout: tuple[pa.Table, Array] | None = None
        self._reached: dict[str, tuple[int, Array]] = {}
        self._validity[count:] = _ABSENT
        for name, array in self._columns.items():
            array[count:] = np.nan
            self._upto[name] = min(self._upto[name], count)

    def _take(self, files: list[StoredFile], first: int, columns: list[str]) -> None:
        new = first >= len(self._files)
        wanted = ["tokens", "time", "validity", *self._names] if new else []
        if not files or not (wanted or columns):
            return
        read = self._read(files, wanted + columns)
        for row, (file, table) in enumerate(zip(files, read, strict=True), first):
            if new:
                self._begin(row, file, table)
            at = self._layouts[row]
            for name in columns:
                if table is None or at is None or name not in table.column_names:
                    self._lacking.setdefault(name, set()).add(row)
                else:
                    self._lacking.get(name, set()).discard(row)
                    numbers = table[name].to_numpy()
                    self._columns[name][row, at] = numbers.astype(np.float32, copy=False)

    def _begin(self, row: int, file: StoredFile, table: pa.Table | None) -> None:
        """Takes down when a file was measured, and where its rows belong."""
        tokens = seconds = np.nan
        at: Array | None = None
        if table is not None and {"validity", *self._names} <= {*table.column_names}:
            at = self._layout(table.select(self._names), len(table))
            validity = table["validity"].combine_chunks()
            code = np.array(
                [self._word(word) for word in validity.dictionary.to_pylist()], np.int16
            )
            if len(at):
                self._validity[row, at] = code[validity.indices.to_numpy()]
                if (first := table["tokens"][0].as_py()) is not None:
                    tokens = float(first)
                seconds = table["time"][0].as_py().timestamp()
        self._files.append(file)
        self._tokens.append(tokens)
        self._seconds.append(seconds)
        self._layouts.append(at)

    def _layout(self, dims: pa.Table, rows: int) -> Array:
        """The series of each row. Files are mostly laid out as the one before."""
        dims = dims.combine_chunks()
        if self._last_layout is not None and self._names and self._last_layout[0].equals(dims):
            return self._last_layout[1]
        columns = [column.to_pylist() for column in dims.columns]
        times: dict[tuple[Any, ...], int] = {}
        at = np.empty(rows, dtype=np.int64)
        for row, key in enumerate(zip(*columns, strict=True) if columns else [()] * rows):
            # Of rows that only their order tells apart each is a series of its own.
            times[key] = again = times.get(key, -1) + 1
            at[row] = self._index.setdefault((*key, again), len(self.dims))
            if at[row] == len(self.dims):
                self.dims.append(key)
        self._last_layout = (dims, at)
        self._rows_for(len(self._validity))
        return at

    def _word(self, word: str) -> int:
        if word not in self._words:
            self._words.append(word)
        return self._words.index(word)

    def _rows_for(self, count: int) -> None:
        """Makes room, and some to spare, so that not each new file moves everything."""
        rows, width = self._validity.shape
        if rows >= count and width >= len(self.dims):
            return
        shape = (
            rows if rows >= count else count + count // 8,
            width if width >= len(self.dims) else len(self.dims) + width // 8,
        )
        self._validity = _grown(self._validity, shape, _ABSENT)
        for name, array in self._columns.items():
            self._columns[name] = _grown(array, shape, np.nan)


def _grown(array: Array, shape: tuple[int, int], fill: float) -> Array:
    grown = np.full(shape, fill, array.dtype)
    grown[: array.shape[0], : array.shape[1]] = array
    return grown
