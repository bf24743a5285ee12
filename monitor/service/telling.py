"""What is told of the runs under a folder: plain values, for JSON and CSV, and a metrics page."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily, Metric

from monitor.record import ProbeSpec, expect_one_of
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile, spec_of
from monitor.service.thinning import kept
from monitor.sinks.exposition import Page, TableRows, scalar_fields

AXES = ("step", "tokens", "time")

# A run is quiet after so many of its usual intervals, and not before so many seconds.
_INTERVALS, _SECONDS = 5, 60.0

_MOST_ROWS = 1_000_000


def runs(folder: Folder) -> list[dict[str, Any]]:
    """What there is of every run, by name."""
    by_run = _by_run(folder)
    return [_run(folder, run, by_run[run]) for run in sorted(by_run)]


def tables(folder: Folder, run: str) -> list[dict[str, Any]]:
    """The declarations of the probes of a run."""
    told = []
    for name, files in sorted(_of_run(folder, run).items()):
        newest = _newest(folder, files)
        if newest is not None and (spec := spec_of(newest)) is not None:
            told.append({"table": name, "files": len(files), **dataclasses.asdict(spec)})
    return told


def series(
    folder: Folder,
    run: str,
    *,
    table: str,
    field: str,
    axis: str,
    dims: Mapping[str, str],
    points: int,
) -> list[dict[str, Any]]:
    """The values of one field along an axis, every series of them thinned to `points`.

    Raises `ValueError` for what there is not, and where there are too many rows.
    """
    of_run = _of_run(folder, run)
    expect_one_of(f"table of run {run!r}", table, [t for t in of_run if t not in NOT_BY_STEP])
    newest = _newest(folder, of_run[table])
    spec = None if newest is None else spec_of(newest)
    if spec is None:
        raise ValueError(f"table {table!r} is no probe's: it has no fields to show")
    numbers = scalar_fields(spec)
    expect_one_of(f"field of table {table!r} that is a number", field, [f.name for f in numbers])
    expect_one_of("axis", axis, AXES)
    wanted = _wanted(spec, dims)
    names = [dim.name for dim in spec.dims]
    columns = [axis, *names, *spec.field(field).columns, "validity"]

    def pick(rows: pa.Table) -> pa.Table:
        for name, value in wanted.items():
            rows = rows.filter(pc.equal(rows[name], value))
        return rows

    what, found, count = (*columns, *wanted.items()), [], 0
    for file in of_run[table]:
        rows = folder.read(file, what, pick, columns)
        if rows is None or field not in rows.column_names:
            continue
        count += len(rows)
        if count > _MOST_ROWS:
            raise ValueError(
                f"more than {_MOST_ROWS} rows of {table!r} match: expected fewer; name one of "
                f"{', '.join(set(names) - set(wanted))}"
            )
        found.append(rows.replace_schema_metadata())
    if not found:
        return []
    frame = pa.concat_tables(found, promote_options="default").to_pandas()
    frame.columns = [_renamed(column, field, axis) for column in frame.columns]
    groups = [rows for _, rows in frame.groupby(names, dropna=False)] if names else [frame]
    thin = pd.concat([g.iloc[kept(g["value"].to_numpy(np.float64), points)] for g in groups])
    thin.insert(0, "run", run)
    return [{k: _plain(v) for k, v in row.items()} for row in thin.to_dict("records")]


def transitions(folder: Folder, run: str) -> list[dict[str, Any]]:
    """What was said of changes in a run, in order of steps."""
    files = _of_run(folder, run).get("transitions", [])
    return [
        {name: _plain(value) for name, value in row.items()}
        for file in files
        if (rows := folder.read(file)) is not None
        for row in rows.to_pylist()
    ]


def latest(folder: Folder) -> dict[str, int]:
    """The last measured step of every run."""
    return {
        run: files[-1].number
        for run, of_run in _by_run(folder).items()
        if (files := _measured(of_run))
    }


def page(folder: Folder, budget: int) -> Page:
    """The last measurement of every run as metrics, each within `budget` series a table."""
    rows: dict[str, list[TableRows]] = {}
    moments: dict[str, dict[str, Any]] = {}
    finished: dict[str, bool] = {}
    for run, of_run in sorted(_by_run(folder).items()):
        finished[run] = _state(of_run, _measured(of_run)) == "finished"
        rows[run] = []
        for name, files in sorted(of_run.items()):
            newest = None if name in NOT_BY_STEP else _newest(folder, files)
            if newest is not None and (spec := spec_of(newest)) is not None:
                rows[run].append(_fitting(spec, newest, budget))
        if moment := _moment(folder, of_run):
            moments[run] = moment
    return Page.of_runs(rows, list(_about(moments, finished)))


def _about(
    moments: Mapping[str, Mapping[str, Any]], finished: Mapping[str, bool]
) -> Iterator[Metric]:
    # What is finished stays on this page, and has not stalled.
    ended = GaugeMetricFamily(
        "phasewatch_run_finished", "1 once the run has come to its end, else 0.", labels=["run"]
    )
    for run, whether in finished.items():
        ended.add_metric([run], float(whether))
    yield ended
    for name, key, help_text in (
        ("step", "step", "Training step of the latest measurement."),
        ("tokens", "tokens", "Training tokens seen at the latest measurement."),
        ("last_measurement_timestamp_seconds", "time", "When the latest measurement was made."),
    ):
        gauge = GaugeMetricFamily(f"phasewatch_{name}", help_text, labels=["run"])
        for run, moment in moments.items():
            value = moment[key]
            if value is not None:
                gauge.add_metric([run], value.timestamp() if key == "time" else value)
        yield gauge


def _fitting(spec: ProbeSpec, table: pa.Table, budget: int) -> TableRows:
    valid = table.filter(pc.equal(table["validity"], "ok"))
    fields = scalar_fields(spec)
    most = budget // max(1, sum(len(field.columns) for field in fields))
    shown = valid
    if len(valid) > most:
        # The best of every field, then the second best of every field, and so on.
        values = valid.select([f.name for f in fields]).to_pandas().to_numpy(np.float64)
        order = np.argsort(-values, axis=0, kind="stable")
        placed = order[~np.isnan(np.take_along_axis(values, order, axis=0))]
        shown = valid.take(np.sort(pd.unique(placed)[:most]))
    return TableRows(spec=spec, valid=valid, shown=shown, invalid=len(table) - len(valid))


def _run(folder: Folder, run: str, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any]:
    measured = _measured(of_run)
    moment = _moment(folder, of_run) or dict.fromkeys(("step", "tokens", "time"))
    rows = [folder.read(file) for file in of_run.get("attempts", [])]
    attempts = [row for table in rows if table is not None for row in table.to_pylist()]
    last = attempts[-1] if attempts else {}
    told = {"attempts": len(attempts), "seed": last.get("seed")}
    told["model"] = json.loads(last.get("config") or "{}").get("model")
    told["parameters"] = last.get("parameters")
    return {
        "run": run,
        "state": _state(of_run, measured),
        "first_step": measured[0].number if measured else None,
        "last_step": moment["step"],
        "tokens": moment["tokens"],
        "time": _plain(moment["time"]),
        "measurements": len({file.number for file in measured}),
        **told,
    }


def _state(of_run: Mapping[str, list[StoredFile]], measured: list[StoredFile]) -> str:
    """Running until it is quiet for several of its usual intervals; then finished where its attempt
    was brought up to date after the last measurement, as closing does, and otherwise stalled.
    """
    written = {file.number: file.stamp[0] / 1e9 for file in measured}
    times = sorted(written.values())
    attempts = [file.stamp[0] / 1e9 for file in of_run.get("attempts", [])]
    usual = statistics.median(np.diff(times)) if len(times) > 1 else 0.0
    last = max([*times, *attempts], default=0.0)
    if time.time() - last <= max(_SECONDS, _INTERVALS * usual):
        return "running"
    return "finished" if times and attempts and max(attempts) >= times[-1] else "stalled"


def _moment(folder: Folder, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any] | None:
    columns = ["step", "tokens", "time"]
    for file in reversed(_measured(of_run)):
        rows = folder.read(file, ("moment",), lambda rows: rows.slice(0, 1), columns)
        if rows is not None and rows.num_rows and rows.num_columns == len(columns):
            moment: dict[str, Any] = rows.to_pylist()[0]
            return moment
    return None


def _measured(of_run: Mapping[str, list[StoredFile]]) -> list[StoredFile]:
    files = [f for name, files in of_run.items() if name not in NOT_BY_STEP for f in files]
    return sorted(files, key=lambda file: file.number)


def _newest(folder: Folder, files: list[StoredFile]) -> pa.Table | None:
    """The last file that can be read."""
    read = (folder.read(file) for file in reversed(files))
    return next((table for table in read if table is not None), None)


def _by_run(folder: Folder) -> dict[str, dict[str, list[StoredFile]]]:
    by_run: dict[str, dict[str, list[StoredFile]]] = {}
    for table, of_table in folder.tables().items():
        for run, files in of_table.items():
            if _newest(folder, files) is not None:
                by_run.setdefault(run, {})[table] = files
    return by_run


def _of_run(folder: Folder, run: str) -> dict[str, list[StoredFile]]:
    by_run = _by_run(folder)
    if run not in by_run:
        raise LookupError(run, sorted(by_run))
    return by_run[run]


def _wanted(spec: ProbeSpec, dims: Mapping[str, str]) -> dict[str, Any]:
    by_name = {dim.name: dim for dim in spec.dims}
    wanted: dict[str, Any] = {}
    for name, value in dims.items():
        expect_one_of(f"dimension of table {spec.name!r}", name, list(by_name))
        try:
            wanted[name] = value if by_name[name].text else int(value)
        except ValueError:
            raise ValueError(f"{name}={value!r}: expected a whole number") from None
    return wanted


def _renamed(column: str, field: str, axis: str) -> str:
    if column == axis:
        return "axis"
    of_field = column == field or column in {f"{field}_{s}" for s in ("stderr", "null", "null_sd")}
    return column.removeprefix(field).removeprefix("_") or "value" if of_field else column


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, times as text."""
    if value is None or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value.isoformat() if hasattr(value, "isoformat") else value
