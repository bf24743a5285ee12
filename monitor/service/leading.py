"""What came before what, and by how much: in each run, and over the runs.

Two kinds of pairs are compared. *Formations*: an event of `monitor.across.formations` (a number
leaves its null behind) lies between two measurements, and so the lead of one over another is known
to within the gaps; nothing of it is a statistic. *Fits*: transitions fitted to whole series by
`monitor.across.fitted`, whose midpoints have 95% intervals, combined as if they were independent.

Early warnings are made of formations: what has not formed in a run yet, what came before it in
other runs under the root, and in how many of those that had that.

All of it is worked out on a thread of its own, once for each state of a run, and in no more than a
small share of the time while the run goes on.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import pandas as pd

from monitor.across import apart, fitted, formations, leads
from monitor.across.pooled import exact_interval
from monitor.names import expect_one_of
from monitor.service.following import NOT_BY_STEP, Folder, StoredFile
from monitor.service.rendering import plain

_log = logging.getLogger("phasewatch")

AXES = ("step", "tokens")

MEANING = {
    "formation": "When a number left its null behind, at two measurements in a row. It happened "
    "between two measurements, and lead_low to lead_high is what these allow: no statistic. The "
    "event whose number has the larger standard error is seen later.",
    "fit": "Midpoints of transitions fitted to the whole of what was measured. lead_low to "
    "lead_high is the 95% interval, as if the two were known independently of each other. Of "
    "each series and direction the first transition is compared.",
}
"""What a lead of each kind is."""

# A run that goes on has its leads worked out anew after so many times what that took.
_SELDOM = 20

_MOST_ANSWERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What was worked out of one run on one axis."""

    state: object
    step: int
    formed: pd.DataFrame
    pairs: pd.DataFrame
    warnings: list[dict[str, Any]]
    error: str | None
    took: float
    at: float


class Leads:
    """The leads of runs, as they become known."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], _Known] = {}
        self._waiting: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self._answered: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._todo: SimpleQueue[tuple[tuple[str, str], object, int] | None] = SimpleQueue()
        # A fit may take long, and nobody is to wait for it when the service ends.
        threading.Thread(target=self._work, name="phasewatch-leads", daemon=True).start()

    def close(self) -> None:
        """Ends the thread, once it is through with what it is at."""
        self._todo.put(None)

    def told(self, runs: Sequence[str], axis: str) -> dict[str, Any]:
        """What is known of some runs, and of which of them it is not known yet.

        Raises `UnknownRunError` where there is no such run, and `ValueError` for another axis.
        """
        expect_one_of("axis of leads", axis, AXES)
        known = {run: self._of_run(run, self._folder.of_run(run), axis) for run in runs}
        there = {run: found for run, (found, _) in known.items() if found is not None}
        answered = (axis, *((run, found.at) for run, found in there.items()))
        if answered not in self._answered:
            if len(self._answered) > _MOST_ANSWERS:
                self._answered.clear()
            self._answered[answered] = _compared([*there.values()], axis)
        return _told(axis, known, self._answered[answered])

    def _of_run(
        self, run: str, of_run: Mapping[str, list[StoredFile]], axis: str
    ) -> tuple[_Known | None, bool]:
        """What is known of a run, and whether that is of its present state."""
        state, step = _state(of_run)
        key = (run, axis)
        with self._lock:
            known = self._known.get(key)
            if known is not None and known.state == state:
                return known, True
            seldom = known is not None and time.monotonic() - known.at < _SELDOM * known.took
            if key not in self._waiting and not seldom:
                self._waiting.add(key)
                self._todo.put((key, state, step))
            return known, False

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            key, state, step = todo
            known = _known(self._folder.root, *key, state, step)
            with self._lock:
                self._waiting.discard(key)
                self._known[key] = known


def at_once(folder: Folder, runs: Sequence[str], axis: str) -> dict[str, Any]:
    """What `Leads.told` says once it is known, however long that takes."""
    known = {run: _known(folder.root, run, axis, *_state(folder.of_run(run))) for run in runs}
    fresh = {run: (found, True) for run, found in known.items()}
    return _told(axis, fresh, _compared([*known.values()], axis))


def _told(
    axis: str, known: Mapping[str, tuple[_Known | None, bool]], compared: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "axis": axis,
        "ready": all(fresh for _, fresh in known.values()),
        "meaning": MEANING,
        "runs": [
            {
                "run": run,
                "ready": fresh,
                "until": found.step if found else None,
                "error": found.error if found else None,
            }
            for run, (found, fresh) in known.items()
        ],
        **compared,
    }


def _state(of_run: Mapping[str, list[StoredFile]]) -> tuple[object, int]:
    """What tells one state of a run from another, and its last step."""
    tables = {name: files[-1] for name, files in of_run.items() if name not in NOT_BY_STEP}
    state = (*tables.items(), *(len(of_run[name]) for name in tables))
    return state, max((file.number for file in tables.values()), default=0)


def _known(root: Path, run: str, axis: str, state: object, step: int) -> _Known:
    begun = time.monotonic()
    formed = pairs = pd.DataFrame()
    warnings: list[dict[str, Any]] = []
    error = None
    try:
        formed, pairs, warnings = _worked_out(root, run, axis)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        _log.warning("the leads of %s could not be worked out: %s", run, error)
    now = time.monotonic()
    return _Known(
        state=state,
        step=step,
        formed=formed,
        pairs=pairs,
        warnings=warnings,
        error=error,
        took=now - begun,
        at=now,
    )


def _worked_out(
    root: Path, run: str, axis: str
) -> tuple[pd.DataFrame, pd.DataFrame, list[dict[str, Any]]]:
    """What formed in a run, how far apart its fitted transitions are, and what that says of what
    has not formed yet.
    """
    fits = fitted(root, [run], axis="tokens" if axis == "tokens" else "step")
    formed = formations(root)
    return formed[formed["run"] == run], apart(fits), _early_warnings(formed, run, axis)


def _early_warnings(formed: pd.DataFrame, run: str, axis: str) -> list[dict[str, Any]]:
    """What formed in other runs after what has formed in this one, and in how many of them."""
    yes = formed[formed["formed"].fillna(False).astype(bool)]
    own = yes[yes["run"] == run].set_index("event")[axis]
    others = yes[yes["run"] != run]
    order = [
        row
        for _, of_run in others.groupby("run", sort=False)
        for row in _formed_apart(of_run, axis)
        if row["sure"] and row["then"] not in own
    ]
    told = []
    for moved, at in own.items():
        runs = int((others["event"] == moved).sum())
        after = [row for row in order if row["first"] == moved]
        for outcome in dict.fromkeys(row["then"] for row in after):
            of_outcome = [row["lead"] for row in after if row["then"] == outcome]
            low, high = exact_interval(len(of_outcome), runs)
            median = float(np.median(of_outcome))
            told.append(
                {
                    "run": run,
                    "moved": moved,
                    "outcome": outcome,
                    "followed": len(of_outcome),
                    "runs": runs,
                    "share_low": low,
                    "share_high": high,
                    "median": median,
                    "least": min(of_outcome),
                    "most": max(of_outcome),
                    "expected": at + median,
                }
            )
    return told


def _compared(known: Sequence[_Known], axis: str) -> dict[str, Any]:
    formed = [of.formed for of in known if of.error is None]
    pairs = [of.pairs for of in known if of.error is None]
    within: list[dict[Any, Any]] = [row for frame in formed for row in _formed_apart(frame, axis)]
    within += [{"kind": "fit", **row} for frame in pairs for row in frame.to_dict("records")]
    over = [*_over_formed(formed, axis), *_over_fits(pairs)]
    warnings = [row for of in known for row in of.warnings]
    told = {"within": within, "over": over, "warnings": warnings}
    return {name: [_plain(row) for row in rows] for name, rows in told.items()}


def _formed_apart(formed: pd.DataFrame, axis: str) -> list[dict[str, Any]]:
    """Each two events of one run, in the order in which they were seen."""
    columns = [axis, f"{axis}_after", f"{axis}_by"]
    rows = formed[formed["formed"].fillna(False).astype(bool)]
    when = [
        (row["event"], *(math.nan if pd.isna(row[c]) else float(row[c]) for c in columns))
        for row in rows.to_dict("records")
    ]
    when.sort(key=lambda of: (math.isnan(of[3]), of[3]))
    told = []
    for first, then in itertools.combinations(when, 2):
        low, high = then[2] - first[3], then[3] - first[2]
        told.append(
            {
                "run": rows["run"].iloc[0],
                "kind": "formation",
                "first": first[0],
                "then": then[0],
                "lead": then[1] - first[1],
                "lead_low": low,
                "lead_high": high,
                "sure": bool(low >= 0),
            }
        )
    return told


def _over_formed(formed: Sequence[pd.DataFrame], axis: str) -> list[dict[Any, Any]]:
    if not formed:
        return []
    whole = pd.concat(formed, ignore_index=True)
    of: Literal["step", "tokens"] = "tokens" if axis == "tokens" else "step"
    told: list[dict[Any, Any]] = []
    for first, then in itertools.combinations(dict.fromkeys(whole["event"]), 2):
        (row,) = leads(whole[whole["event"].isin([first, then])], of).to_dict("records")
        if row["runs"]:
            told.append({"kind": "formation", **row})
    return told


def _over_fits(pairs: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Each two transitions that several runs or one had, named in the order of their median."""
    signed: dict[tuple[str, str], list[tuple[float, bool]]] = {}
    for row in (row for frame in pairs for row in frame.to_dict("records")):
        key = (row["first"], row["then"])
        if key[0] < key[1]:
            signed.setdefault(key, []).append((row["lead"], row["sure"]))
        else:
            signed.setdefault(key[::-1], []).append((-row["lead"], row["sure"]))
    told = []
    for (first, then), found in sorted(signed.items()):
        lead = np.array([each for each, _ in found], dtype=float)
        sure = np.array([each for _, each in found], dtype=bool)
        backwards = np.median(lead) < 0
        lead = -lead if backwards else lead
        before, after = int((sure & (lead > 0)).sum()), int((sure & (lead < 0)).sum())
        told.append(
            {
                "kind": "fit",
                "first": then if backwards else first,
                "then": first if backwards else then,
                "runs": len(found),
                "before": before,
                "after": after,
                "unclear": len(found) - before - after,
                "timed": len(found),
                "median": float(np.median(lead)),
                "least": lead.min(),
                "most": lead.max(),
                "resolution": None,
                "validity": "ok",
            }
        )
    return told


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """As JSON has it: numpy's and pandas' scalars are none of Python's."""
    told: dict[str, Any] = {}
    for name, value in row.items():
        if value is pd.NA:
            told[name] = None
        else:
            told[name] = plain(value.item() if isinstance(value, np.generic) else value)
    return {name: value for name, value in told.items() if name != "axis"}
