"""Series of one field along an axis, and the rows of one measurement, in the formats there are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from monitor.names import expect_one_of
from monitor.record import ProbeSpec
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile, spec_of
from monitor.service.gathering import Array, Gatherer, Lines
from monitor.service.rendering import csv_rows, joined, json_rows, json_values, plain
from monitor.service.thinning import kept
from monitor.sinks.exposition import scalar_fields

AXES = ("step", "tokens", "time")
FORMATS = ("json", "csv", "columns")

_MOST_ROWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a field: `dims` are values that dimensions must have, `top` is how many
    series of each run (None: all), `points` how many measurements of each.
    """

    table: str
    field: str
    axis: str = "step"
    dims: Mapping[str, str] = dataclasses.field(default_factory=dict)
    points: int = 1_000
    top: int | None = None


def declared(folder: Folder, run: str, table: str) -> tuple[ProbeSpec, list[StoredFile]]:
    """The declaration of a table of a run, and its files.

    Raises `UnknownRunError` where there is no such run, and `ValueError` where the table is no
    probe's.
    """
    of_run = folder.of_run(run)
    expect_one_of(f"table of run {run!r}", table, [t for t in of_run if t not in NOT_BY_STEP])
    for file in reversed(of_run[table]):
        if (schema := folder.schema(file)) is not None:
            spec = spec_of(schema)
            if spec is None:
                break
            return spec, of_run[table]
    raise ValueError(f"table {table!r} is no probe's: it has no fields to show")


class Charts:
    """Answers about series, as text."""

    def __init__(self, folder: Folder, gatherer: Gatherer) -> None:
        self._folder, self._gatherer = folder, gatherer

    def series(self, runs: Sequence[str], asked: Asked, form: str) -> tuple[bytes, str]:
        """The text and its content type.

        Raises `UnknownRunError` where there is no such run, and `ValueError` for what else there is
        not,
        and where too many rows are asked for.
        """
        expect_one_of("axis", asked.axis, AXES)
        expect_one_of("format", form, FORMATS)
        found = [self._of_run(run, asked) for run in runs]
        spec = found[-1][0]
        parts = [_Part(run, lines, asked) for run, (_, lines) in zip(runs, found, strict=True)]
        if form == "columns":
            return _columnar(spec, asked, parts), "application/json"
        columns = _long(spec, parts, time_as_text=asked.axis == "time")
        if form == "csv":
            return csv_rows(columns), "text/csv"
        return json_rows({name: json_values(v) for name, v in columns.items()}), "application/json"

    def _of_run(self, run: str, asked: Asked) -> tuple[ProbeSpec, Lines]:
        spec, files = declared(self._folder, run, asked.table)
        numbers = [field.name for field in scalar_fields(spec)]
        expect_one_of(f"field of table {asked.table!r} that is a number", asked.field, numbers)
        wanted = _wanted(spec, asked.dims)

        def choose(dims: list[tuple[Any, ...]], reached: Callable[[], Array]) -> list[int]:
            chosen: list[int] | range = range(len(dims))
            if wanted:
                chosen = [at for at in chosen if all(dims[at][k] == v for k, v in wanted)]
            if asked.top is not None and chosen:
                best = reached()[np.array(chosen)]
                order = np.argsort(-best, kind="stable")[: asked.top]
                chosen = [chosen[at] for at in order if np.isfinite(best[at])]
            if len(chosen) * len(files) > _MOST_ROWS:
                free = [d.name for k, d in enumerate(spec.dims) if k not in dict(wanted)]
                raise ValueError(
                    f"more than {_MOST_ROWS} rows of {asked.table!r} match: expected fewer; name "
                    f"one of {', '.join(free)}, or pass top="
                )
            if asked.top is not None:
                return [*chosen]
            return sorted(chosen, key=lambda at: [(value is None, value) for value in dims[at]])

        return spec, self._gatherer.lines(run, spec, files, spec.field(asked.field), choose)


class _Part:
    """The series of one run: which cells are shown, one series after the other."""

    def __init__(self, run: str, lines: Lines, asked: Asked) -> None:
        self.run, self.lines, self.field = run, lines, asked.field
        value = lines.columns[asked.field]
        rows = []
        for series in range(len(lines.dims)):
            there = np.flatnonzero(lines.validity[:, series] >= 0)
            if len(there) > asked.points:
                there = there[kept(value[there, series].astype(np.float64), asked.points)]
            rows.append(there)
        self.rows = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        self.bounds = np.cumsum([0, *map(len, rows)])
        self.series = np.repeat(np.arange(len(rows)), np.diff(self.bounds))
        axis = {"step": lines.steps, "tokens": lines.tokens, "time": lines.seconds}[asked.axis]
        # Counted in whole numbers, but not at every measurement.
        self.axis = _whole(axis[self.rows]) if asked.axis == "tokens" else pa.array(axis[self.rows])

    def columns(self) -> dict[str, pa.Array]:
        """What goes with the field, under the names that its columns have here."""
        return {
            name.removeprefix(self.field).removeprefix("_") or "value": pa.array(
                column[self.rows, self.series]
            )
            for name, column in self.lines.columns.items()
        }

    def validity(self) -> pa.Array:
        """In words, of every cell."""
        codes = pa.array(self.lines.validity[self.rows, self.series], pa.int32())
        return pa.DictionaryArray.from_arrays(codes, pa.array(self.lines.words, pa.string()))


def _long(spec: ProbeSpec, parts: Sequence[_Part], *, time_as_text: bool) -> dict[str, Any]:
    """A row for each cell."""
    tables = []
    for part in parts:
        axis = part.axis
        if time_as_text:
            told = {
                t: datetime.fromtimestamp(t, UTC).isoformat() for t in axis.unique().to_pylist()
            }
            axis = pa.array([told[t] for t in axis.to_pylist()], pa.string())
        columns = {"run": pa.array([part.run] * len(part.rows), pa.string()), "axis": axis}
        for at, dim in enumerate(spec.dims):
            kind = pa.string() if dim.text else pa.int64()
            values = pa.array([dims[at] for dims in part.lines.dims], kind)
            columns[dim.name] = values.take(pa.array(part.series))
        columns |= part.columns()
        columns["validity"] = part.validity().cast(pa.string())
        tables.append(pa.table(columns))
    whole = pa.concat_tables(tables, promote_options="default").combine_chunks()
    return {name: whole[name] for name in whole.column_names}


def _columnar(spec: ProbeSpec, asked: Asked, parts: Sequence[_Part]) -> bytes:
    """An object for each series, with a list for each column."""
    texts: list[bytes] = []
    for part in parts:
        lists = {"axis": part.axis, **part.columns(), "validity": part.validity()}
        told = {name: joined(json_values(v), part.bounds).to_pylist() for name, v in lists.items()}
        of_ok = part.lines.words.index("ok") if "ok" in part.lines.words else -1
        fine = part.lines.validity[part.rows, part.series] == of_ok
        for at, dims in enumerate(part.lines.dims):
            first, last = part.bounds[at : at + 2]
            if first == last:
                continue
            named = dict(zip((dim.name for dim in spec.dims), dims, strict=True))
            columns = [
                f'"{name}":[{values[at]}]'
                for name, values in told.items()
                if name != "validity" or not fine[first:last].all()
            ]
            head = f'{{"run":{json.dumps(part.run)},"dims":{json.dumps(named)},'
            texts.append((head + ",".join(columns) + "}").encode())
    told_first = {
        "table": asked.table,
        "field": dataclasses.asdict(spec.field(asked.field)),
        "axis": asked.axis,
    }
    return json.dumps(told_first)[:-1].encode() + b',"series":[' + b",".join(texts) + b"]}"


def rows(
    folder: Folder, run: str, *, table: str, step: int | None, fields: Sequence[str], form: str
) -> tuple[bytes, str]:
    """The rows of a table as they were last measured at or before a step, and the content type.

    Fields `per` an axis are told where they are named in `fields`.
    """
    expect_one_of("format", form, FORMATS)
    spec, files = declared(folder, run, table)
    for field in fields:
        expect_one_of(f"field of table {table!r}", field, [f.name for f in spec.fields])
    shown = [f for f in spec.fields if (f.name in fields if fields else not f.per)]
    names = [*(d.name for d in spec.dims), *(c for f in shown for c in f.columns), "n", "validity"]
    measured = [file for file in files if step is None or file.number <= step]
    for file in reversed(measured):
        read = folder.load(file, names)
        if read is not None:
            break
    else:
        raise ValueError(f"table {table!r} of run {run!r} has no measurement at or before {step}")
    # Earlier attempts may not have measured every field.
    columns = {
        name: read[name].combine_chunks() if name in read.column_names else pa.nulls(len(read))
        for name in names
    }
    if form == "csv":
        return csv_rows(columns), "text/csv"
    texts = {name: json_values(values) for name, values in columns.items()}
    if form == "json":
        return json_rows(texts), "application/json"
    head = {
        "table": table,
        "run": run,
        "step": file.number,
        "steps": [each.number for each in files],
    }
    lists = [f'"{n}":[{joined(t, [0, len(t)])[0].as_py()}]' for n, t in texts.items()]
    whole = json.dumps(head)[:-1] + ',"columns":{' + ",".join(lists) + "}}"
    return whole.encode(), "application/json"


def transitions(
    folder: Folder, gatherer: Gatherer, runs: Sequence[str], axis: str
) -> list[dict[str, Any]]:
    """What was said of changes in some runs, in order of steps, with where that lies on an axis.

    `at` has the places of each row that are steps, on the axis: between measurements as if tokens
    and time had passed evenly, and null beyond them.
    """
    expect_one_of("axis", axis, AXES)
    told = []
    for run in runs:
        of_run = folder.of_run(run)
        place = _placing(folder, gatherer, run, of_run, axis)
        for file in of_run.get("transitions", []):
            read = folder.read(file)
            if read is None or (spec := spec_of(read.schema)) is None:
                continue
            steps = ["step", *(f.name for f in spec.fields if f.unit == "steps")]
            places = [name for name in steps if not name.startswith("width")]
            for row in read.to_pylist():
                clean = {name: plain(value) for name, value in row.items()}
                at = {name: place(clean[name]) for name in places if name in clean}
                told.append({"run": run, **clean, "at": at})
    return told


def _placing(
    folder: Folder, gatherer: Gatherer, run: str, of_run: Mapping[str, list[StoredFile]], axis: str
) -> Callable[[float | None], float | None]:
    """What turns a step of a run into its place on an axis."""
    if axis == "step":
        return lambda step: step
    names = [name for name in of_run if name not in (*NOT_BY_STEP, "transitions", "failures")]
    if not names:
        return lambda _: None
    # The table with the most measurements, and of these the one that is read fastest.
    most = max(names, key=lambda name: (len(of_run[name]), -of_run[name][-1].stamp[1]))
    spec, files = declared(folder, run, most)
    steps, tokens, seconds = gatherer.moments(run, spec, files)
    places = tokens if axis == "tokens" else seconds
    known = np.isfinite(places)
    steps, places = steps[known], places[known]

    def place(step: float | None) -> float | None:
        if step is None or not len(steps) or not steps[0] <= step <= steps[-1]:
            return None
        return float(np.interp(step, steps, places))

    return place


def _wanted(spec: ProbeSpec, dims: Mapping[str, str]) -> list[tuple[int, Any]]:
    """Which dimensions, by their place, must have which values."""
    names = [dim.name for dim in spec.dims]
    wanted: list[tuple[int, Any]] = []
    for name, value in dims.items():
        expect_one_of(f"dimension of table {spec.name!r}", name, names)
        at = names.index(name)
        try:
            wanted.append((at, value if spec.dims[at].text else int(value)))
        except ValueError:
            raise ValueError(f"{name}={value!r}: expected a whole number") from None
    return wanted


def _whole(numbers: Array) -> pa.Array:
    counted = np.isfinite(numbers)
    return pa.array(np.where(counted, numbers, 0).astype(np.int64), mask=~counted)
