"""What is told of the runs under a folder: plain values, for JSON and CSV, and a metrics page."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client.core import GaugeMetricFamily, Metric

from monitor.record import ProbeSpec
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile, spec_of
from monitor.service.rendering import plain
from monitor.sinks.exposition import Page, TableRows, scalar_fields

# A run is quiet after so many of its usual intervals, and not before so many seconds.
_INTERVALS, _SECONDS = 5, 60.0


def runs(folder: Folder) -> list[dict[str, Any]]:
    """What there is of every run, by name."""
    by_run = _by_run(folder)
    return [_run(folder, run, by_run[run]) for run in sorted(by_run)]


def tables(folder: Folder, run: str) -> list[dict[str, Any]]:
    """The declarations of the probes of a run."""
    told = []
    for name, files in sorted(folder.of_run(run).items()):
        schema = _schema(folder, files)
        if schema is not None and (spec := spec_of(schema)) is not None:
            told.append({"table": name, "files": len(files), **dataclasses.asdict(spec)})
    return told


def latest(folder: Folder) -> dict[str, tuple[str, dict[int, frozenset[str]]]]:
    """Of every run its state, and by measured step the tables."""
    return {
        run: (_state(of_run, _last_attempt(folder, of_run))[0], folder.steps(run, of_run))
        for run, of_run in _by_run(folder).items()
    }


def page(folder: Folder, budget: int) -> Page:
    """The last measurement of every run as metrics, each within `budget` series a table."""
    rows: dict[str, list[TableRows]] = {}
    moments: dict[str, dict[str, Any]] = {}
    finished: dict[str, bool] = {}
    for run, of_run in sorted(_by_run(folder).items()):
        finished[run] = _state(of_run, _last_attempt(folder, of_run))[0] == "finished"
        rows[run] = []
        for name, files in sorted(of_run.items()):
            newest = None if name in NOT_BY_STEP else _newest(folder, files)
            if newest is not None and (spec := spec_of(newest.schema)) is not None:
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
    steps = [*folder.steps(run, of_run)]
    moment = _moment(folder, of_run) or dict.fromkeys(("step", "tokens", "time"))
    last = _last_attempt(folder, of_run)
    told = {"attempts": len(of_run.get("attempts", [])), "seed": last.get("seed")}
    told["model"] = json.loads(last.get("config") or "{}").get("model")
    told["parameters"] = last.get("parameters")
    state, guessed = _state(of_run, last)
    return {
        "run": run,
        "state": state,
        "guessed": guessed,
        "ended": plain(last.get("ended")),
        "first_step": steps[0] if steps else None,
        "last_step": moment["step"],
        "tokens": moment["tokens"],
        "time": plain(moment["time"]),
        "measurements": len(steps),
        **told,
    }


def _state(of_run: Mapping[str, list[StoredFile]], last: Mapping[str, Any]) -> tuple[str, bool]:
    """Finished once its last attempt was closed; else running until it is quiet for several of its
    usual intervals, and then stalled. And whether that is a guess.

    Attempts of earlier versions do not say whether they were closed. They are taken to be so where
    their row was brought up to date after the last measurement, as closing does.
    """
    if last.get("ended") is not None:
        return "finished", False
    tables = [files for name, files in of_run.items() if name not in NOT_BY_STEP]
    often = sorted(file.stamp[0] / 1e9 for file in max(tables, key=len, default=[]))
    usual = statistics.median(np.diff(often)) if len(often) > 1 else 0.0
    measured = max((files[-1].stamp[0] / 1e9 for files in tables), default=None)
    described = max((file.stamp[0] / 1e9 for file in of_run.get("attempts", [])), default=None)
    quiet = time.time() - max(measured or 0.0, described or 0.0)
    if quiet <= max(_SECONDS, _INTERVALS * usual):
        return "running", False
    if "ended" in last:
        return "stalled", False
    closed = measured is not None and described is not None and described >= measured
    return ("finished" if closed else "stalled"), True


def _last_attempt(folder: Folder, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any]:
    rows = _newest(folder, of_run.get("attempts", []))
    return {} if rows is None or not len(rows) else dict(rows.to_pylist()[-1])


def _moment(folder: Folder, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any] | None:
    """When was measured last."""
    columns = ["step", "tokens", "time"]
    tables = [files for name, files in of_run.items() if name not in NOT_BY_STEP]
    for files in sorted(tables, key=lambda files: files[-1].number, reverse=True):
        rows = _newest(folder, files)
        if rows is not None and rows.num_rows and {*columns} <= {*rows.column_names}:
            moment: dict[str, Any] = rows.select(columns).slice(0, 1).to_pylist()[0]
            return moment
    return None


def _newest(folder: Folder, files: list[StoredFile]) -> pa.Table | None:
    """The last file that can be read."""
    read = (folder.read(file) for file in reversed(files))
    return next((table for table in read if table is not None), None)


def _schema(folder: Folder, files: list[StoredFile]) -> pa.Schema | None:
    """The columns of the last file that can be read."""
    read = (folder.schema(file) for file in reversed(files))
    return next((schema for schema in read if schema is not None), None)


def _by_run(folder: Folder) -> dict[str, dict[str, list[StoredFile]]]:
    """By run and table, the files, where any can be read."""
    by_run: dict[str, dict[str, list[StoredFile]]] = {}
    for run, of_run in folder.runs().items():
        for table, files in of_run.items():
            if _schema(folder, files) is not None:
                by_run.setdefault(run, {})[table] = files
    return by_run
