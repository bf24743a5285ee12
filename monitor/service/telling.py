"""What is told of the runs under a folder: plain values, for JSON and CSV, and a metrics page."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from monitor.service.following import NOT_BY_STEP, Folder, StoredFile, spec_of
from monitor.service.rendering import plain

# A run is quiet after so many of its usual intervals, and not before so many seconds.
_INTERVALS, _SECONDS = 5, 60.0


def runs(folder: Folder) -> list[dict[str, Any]]:
    """What there is of every run, by name."""
    by_run = readable(folder)
    return [_run(folder, run, by_run[run]) for run in sorted(by_run)]


def tables(folder: Folder, run: str) -> list[dict[str, Any]]:
    """The declarations of the probes of a run."""
    told = []
    for name, files in sorted(folder.of_run(run).items()):
        schema = schema_of(folder, files)
        if schema is not None and (spec := spec_of(schema)) is not None:
            told.append({"table": name, "files": len(files), **dataclasses.asdict(spec)})
    return told


def latest(folder: Folder) -> dict[str, tuple[str, dict[int, frozenset[str]]]]:
    """Of every run its state, and by measured step the tables."""
    return {
        run: (state_of(of_run, last_attempt(folder, of_run))[0], folder.steps(run, of_run))
        for run, of_run in readable(folder).items()
    }


def _run(folder: Folder, run: str, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any]:
    steps = [*folder.steps(run, of_run)]
    moment = moment_of(folder, of_run) or dict.fromkeys(("step", "tokens", "time"))
    last = last_attempt(folder, of_run)
    told = {name: last.get(name) for name in ("seed", "model", "parameters")}
    state, guessed = state_of(of_run, last)
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
        "attempts": len(of_run.get("attempts", [])),
        **told,
    }


def state_of(of_run: Mapping[str, list[StoredFile]], last: Mapping[str, Any]) -> tuple[str, bool]:
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


def last_attempt(folder: Folder, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any]:
    """The row of the last attempt, with its `model`; empty where attempts were not written."""
    rows = newest(folder, of_run.get("attempts", []))
    if rows is None or not len(rows):
        return {}
    row: dict[str, Any] = rows.to_pylist()[-1]
    return row | {"model": json.loads(row.get("config") or "{}").get("model")}


def moment_of(folder: Folder, of_run: Mapping[str, list[StoredFile]]) -> dict[str, Any] | None:
    """When was measured last."""
    columns = ["step", "tokens", "time"]
    tables = [files for name, files in of_run.items() if name not in NOT_BY_STEP]
    for files in sorted(tables, key=lambda files: files[-1].number, reverse=True):
        rows = newest(folder, files)
        if rows is not None and rows.num_rows and {*columns} <= {*rows.column_names}:
            moment: dict[str, Any] = rows.select(columns).slice(0, 1).to_pylist()[0]
            return moment
    return None


def newest(folder: Folder, files: list[StoredFile]) -> pa.Table | None:
    """The last file that can be read."""
    read = (folder.read(file) for file in reversed(files))
    return next((table for table in read if table is not None), None)


def schema_of(folder: Folder, files: list[StoredFile]) -> pa.Schema | None:
    """The columns of the last file that can be read."""
    read = (folder.schema(file) for file in reversed(files))
    return next((schema for schema in read if schema is not None), None)


def readable(folder: Folder) -> dict[str, dict[str, list[StoredFile]]]:
    """By run and table, the files, where any can be read."""
    by_run: dict[str, dict[str, list[StoredFile]]] = {}
    for run, of_run in folder.runs().items():
        for table, files in of_run.items():
            if schema_of(folder, files) is not None:
                by_run.setdefault(run, {})[table] = files
    return by_run
