"""When each event happened in each run, as far as the measurements can tell.

An event has happened when it was there at two consecutive measurements of one series (one head);
it happened at the first of them at the latest, and after the measurement before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from monitor.detection.events import EVENTS, Claim, Event, Seen
from monitor.names import expect_one_of
from monitor.query import read, tables

ALREADY = "already formed at the first measurement"

_COLUMNS = {
    "run": "object",
    "event": "object",
    "formed": "boolean",
    "step": "Int64",
    "step_after": "Int64",
    "step_by": "Int64",
    "step_last": "Int64",
    "tokens": "Int64",
    "tokens_after": "Int64",
    "tokens_by": "Int64",
    "tokens_last": "Int64",
    "layer": "Int64",
    "head": "Int64",
    "field": "object",
    "value": "float64",
    "value_stderr": "float64",
    "value_null": "float64",
    "n": "Int64",
    "measurements": "Int64",
    "validity": "object",
    "seed": "Int64",
    "parameters": "Int64",
}


def formations(
    root: str | Path,
    runs: Sequence[str] | None = None,
    events: Sequence[Event] = EVENTS,
) -> pd.DataFrame:
    """When what formed: a row for each run and event, in that order.

    `formed` is missing where the run's tables cannot say, and `validity` why. It happened after
    `step_after` and at `step_by` at the latest; `step` is that step, and missing where it had
    already happened at the first measurement. `tokens…` are the training tokens seen then, missing
    where they were not counted; `step_last` is how far the run was watched. `layer` and `head`
    name the head that formed first, or else the one that ends nearest to it, and `value` is its
    `field` at the last of the `measurements`, over `n` sequences. `seed` and `parameters` are those
    of the run's last attempt.

    What a restart superseded is left out, as in `read`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such run.
        TypeError: `runs` is one name, not a list of names.
    """
    if isinstance(runs, str):
        raise TypeError(f"runs is {runs!r}: expected a list of names, such as [{runs!r}]")
    known = runs_of(root)
    there = sorted({run for names in known.values() for run in names})
    for run in runs or ():
        expect_one_of(f"run in {root}", run, there)
    rows = [
        {"run": run, "event": event.name, "field": event.field, **attempt, **found}
        for run in (there if runs is None else dict.fromkeys(runs))
        for attempt in [_attempt(root, run, known)]
        for event, found in _of_run(root, run, events, known)
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def runs_of(root: str | Path) -> dict[str, set[str]]:
    """The names of the runs in each table under `root`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return {
        table: {
            path.parent.name.removeprefix("run=")
            for path in (Path(root) / table).glob("run=*/*.parquet")
        }
        for table in tables(root)
    }


def _of_run(
    root: str | Path, run: str, events: Sequence[Event], known: dict[str, set[str]]
) -> list[tuple[Event, dict[str, Any]]]:
    """What is found of each event; tables that several events share are read once."""
    frames: dict[str, pd.DataFrame] = {}
    found: list[tuple[Event, dict[str, Any]]] = []
    for event in events:
        if run not in known.get(event.table, ()):
            found.append((event, {"validity": f"no table `{event.table}` was recorded"}))
            continue
        if event.table not in frames:
            frames[event.table] = read(root, event.table, run=run)
        found.append((event, _find(event, frames[event.table])))
    return found


def _attempt(root: str | Path, run: str, known: dict[str, set[str]]) -> dict[str, Any]:
    if run not in known.get("attempts", ()):
        return {}
    last = read(root, "attempts", run=run).iloc[-1]
    return {"seed": last["seed"], "parameters": last["parameters"]}


def _find(event: Event, frame: pd.DataFrame) -> dict[str, Any]:
    try:
        seen = event.see(frame)
    except ValueError as error:
        return {"validity": str(error)}
    at = np.flatnonzero(seen.measured.any(1))
    found: dict[str, Any] = {"measurements": len(at)}
    if len(at) < 2:
        return found | {"validity": _why_unmeasured(event, frame, len(at))}
    found |= _moment(frame, seen, "_last", int(at[-1]))
    onset = _onset(seen)
    if onset is None:
        series = _strongest_at_the_end(seen)
        return found | _end(event, frame, seen, series) | _not_formed(frame, seen, series)
    by, series = onset
    found |= {"formed": True, "validity": "ok"} | _end(event, frame, seen, series)
    found |= _moment(frame, seen, "_by", by)
    before = np.flatnonzero(seen.measured[:by, series])
    if not len(before):
        return found | {"validity": ALREADY}
    return found | _moment(frame, seen, "_after", int(before[-1])) | _moment(frame, seen, "", by)


def _onset(seen: Seen) -> tuple[int, int] | None:
    """The first of two consecutive measurements of one series at which it held, and the series.

    Of several series the one whose second came first, and of these the strongest: what is said at
    one measurement is not taken back at a later one.
    """
    held = np.zeros(seen.held.shape[1], dtype=bool)
    last = np.zeros(seen.held.shape[1], dtype=np.int64)
    for at in range(len(seen.steps)):
        twice = np.flatnonzero(held & seen.held[at])
        if len(twice):
            series = int(twice[np.argmax(seen.strength[at, twice])])
            return int(last[series]), series
        measured = seen.measured[at]
        held = np.where(measured, seen.held[at], held)
        last = np.where(measured, at, last)
    return None


def _strongest_at_the_end(seen: Seen) -> int:
    last = np.flatnonzero(seen.measured.any(1))[-1]
    return int(np.argmax(np.where(seen.measured[last], seen.strength[last], -np.inf)))


def _not_formed(frame: pd.DataFrame, seen: Seen, series: int) -> dict[str, Any]:
    measured = np.flatnonzero(seen.measured[:, series])
    if seen.held[measured[-1], series]:
        return {"formed": False, "validity": "held at the last measurement only"}
    row = frame.iloc[seen.rows[measured[-1], series]]
    # A word may be said of what cannot be interpreted, with the reason beside it.
    return {"formed": False, "validity": row["validity"]}


def _why_unmeasured(event: Event, frame: pd.DataFrame, measurements: int) -> str:
    reasons = frame.loc[frame["validity"].ne("ok"), "validity"]
    if measurements == 0 and len(reasons):
        return f"`{event.field}` was not measured: {reasons.iloc[-1]}"
    times = "once" if measurements else "never"
    if isinstance(event, Claim):
        return (
            f"too few measurements: `{event.test}` was made {times}, two are needed: give "
            "ablations more time (overhead= or seconds=)"
        )
    return f"too few measurements: `{event.field}` was measured {times}, two are needed"


def _moment(frame: pd.DataFrame, seen: Seen, name: str, at: int) -> dict[str, Any]:
    rows = seen.rows[at]
    tokens = frame["tokens"].iloc[rows[rows >= 0][0]]
    # Arrow's integers with gaps come as floats.
    counted = pd.NA if pd.isna(tokens) else int(tokens)
    return {f"step{name}": int(seen.steps[at]), f"tokens{name}": counted}


def _end(event: Event, frame: pd.DataFrame, seen: Seen, series: int) -> dict[str, Any]:
    """The series at its last measurement."""
    at = np.flatnonzero(seen.measured[:, series])[-1]
    row = frame.iloc[seen.rows[at, series]]
    end = {"layer": row.get("layer"), "head": row.get("head"), "n": row["n"]}
    if not isinstance(row[event.field], str):
        for part in ("", "_stderr", "_null"):
            end[f"value{part}"] = row.get(f"{event.field}{part}")
    return end
