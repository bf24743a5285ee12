"""Transitions fitted to the whole of what was measured, how far apart they are, and what those that
led in earlier runs say of one that is still going on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pandas as pd

from monitor.across.formed import runs_of
from monitor.across.pooled import exact_interval
from monitor.detection import SERIES, Series
from monitor.detection.chain import Chain
from monitor.detection.series import values_of
from monitor.names import expect_one_of
from monitor.query import connect
from monitor.transitions import Transition, fit

Axis = Literal["step", "tokens", "log_step"]

NONE = "no transition"
"""The validity of a series in which none was found."""

_NUMBERS = [
    field.name for field in dataclasses.fields(Transition) if field.name not in {"direction", "n"}
]
_COLUMNS = [
    *("run", "series", "direction"),
    *(name for name in _NUMBERS if name != "validity"),
    *("n", "searched", "last", "validity"),
]


def fitted(
    root: str | Path,
    runs: Sequence[str] | None = None,
    series: Sequence[Series] = SERIES,
    *,
    axis: Axis = "step",
) -> pd.DataFrame:
    """The transitions of every run and series, in the order of their midpoints; a row whose
    validity is `no transition` for a series without any.

    The columns are those of `monitor.transitions.Transition`, in steps or tokens, with `searched`,
    the number of series of the run that were looked through, and `last`, where the series ends.
    The more series there are the clearer one must be: 2 log(searched) is added to the ΔBIC of 10
    that a transition needs. One that is lower than two standard errors of its series is none.

    Args:
        root: folder of the tables.
        runs: names of runs; default: all.
        series: what is looked through.
        axis: `step`, `tokens`, or `log_step`, along whose logarithm a transition has its form.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such run or axis, or a query fails.
        TypeError: `runs` is one name, not a list of names.
    """
    if isinstance(runs, str):
        raise TypeError(f"runs is {runs!r}: expected a list of names, such as [{runs!r}]")
    expect_one_of("axis", axis, ["step", "tokens", "log_step"])
    there = sorted({run for names in runs_of(root).values() for run in names})
    for run in runs or ():
        expect_one_of(f"run in {root}", run, there)
    rows = [
        row
        for run in (there if runs is None else dict.fromkeys(runs))
        for row in _of_run(root, run, series, axis)
    ]
    return pd.DataFrame(rows, columns=_COLUMNS)


def apart(fits: pd.DataFrame) -> pd.DataFrame:
    """How long before one another the transitions of each run had their midpoints: a row for each
    run and two of them, `first` before `then` or at the same time.

    `lead` is the distance, and `lead_low` to `lead_high` its 95% interval, as if the two were
    known independently of each other; where that holds 0 the order is not `sure`. What is compared
    is the first transition of each series in each direction.
    """
    rows = []
    for run, of_run in _first_ones(fits).groupby("run", sort=False):
        in_order = of_run.sort_values("midpoint", kind="stable").to_dict("records")
        for first, then in itertools.combinations(in_order, 2):
            lead = then["midpoint"] - first["midpoint"]
            low = math.hypot(
                then["midpoint"] - then["midpoint_low"], first["midpoint_high"] - first["midpoint"]
            )
            high = math.hypot(
                then["midpoint_high"] - then["midpoint"], first["midpoint"] - first["midpoint_low"]
            )
            rows.append(
                {
                    "run": run,
                    "first": _named(first),
                    "then": _named(then),
                    "lead": lead,
                    "lead_low": lead - low,
                    "lead_high": lead + high,
                    "sure": lead - low > 0,
                }
            )
    columns = ["run", "first", "then", "lead", "lead_low", "lead_high", "sure"]
    return pd.DataFrame(rows, columns=columns)


def early_warnings(fits: pd.DataFrame, run: str) -> pd.DataFrame:
    """What the transitions that a run has had so far preceded in other runs, and how often: a row
    for each of them and each that may follow.

    `followed` of the `runs` other runs that had `moved` had `outcome` surely after it, which is
    `share` with an exact 95% interval (Clopper and Pearson), as if the runs were drawn at random;
    `median`, `least` and `most` are of how long after, and `expected` is where that puts it in this
    run (the median). Outcomes that the run has had are left out.

    Raises:
        ValueError: there is no such run.
    """
    expect_one_of("run", run, list(dict.fromkeys(fits["run"])))
    first = _first_ones(fits)
    own, others = first[first["run"] == run], first[first["run"] != run]
    has = {_named(row) for row in own.to_dict("records")}
    pairs = apart(others)
    rows = []
    for moved in own.sort_values("midpoint", kind="stable").to_dict("records"):
        name = _named(moved)
        same = others[(others["series"] == moved["series"])]
        runs = same[same["direction"] == moved["direction"]]["run"].nunique()
        after = pairs[(pairs["first"] == name) & pairs["sure"].astype(bool)]
        for outcome, of_outcome in after.groupby("then", sort=True):
            if outcome in has:
                continue
            leads = of_outcome["lead"].to_numpy(dtype=float)
            low, high = exact_interval(len(leads), runs)
            rows.append(
                {
                    "moved": name,
                    "outcome": outcome,
                    "followed": len(leads),
                    "runs": runs,
                    "share": len(leads) / runs,
                    "share_low": low,
                    "share_high": high,
                    "median": float(np.median(leads)),
                    "least": leads.min(),
                    "most": leads.max(),
                    "expected": moved["midpoint"] + float(np.median(leads)),
                }
            )
    columns = [
        *("moved", "outcome", "followed", "runs", "share", "share_low", "share_high"),
        *("median", "least", "most", "expected"),
    ]
    return pd.DataFrame(rows, columns=columns)


def _of_run(
    root: str | Path, run: str, series: Sequence[Series], axis: Axis
) -> list[dict[str, Any]]:
    measured: dict[str, tuple[list[float], list[float], list[float]]] = {}
    with contextlib.closing(connect(root, run=run)) as connection:
        for each in series:
            by_step, error = values_of(each, connection)
            if error is not None:
                raise error
            for step, values in by_step.items():
                for value in values:
                    steps, numbers, least = measured.setdefault(value.series, ([], [], []))
                    steps.append(step)
                    numbers.append(value.value)
                    least.append(value.least)
        tokens = _tokens(connection) if axis == "tokens" else {}
        breaks = _breaks(connection)
    rows = []
    needed = 10 + 2 * math.log(max(1, len(measured)))
    for name, (steps, numbers, least) in measured.items():
        common = {"run": run, "series": name, "searched": len(measured), "n": len(steps)}
        at = [tokens.get(int(step), math.nan) for step in steps] if axis == "tokens" else steps
        if not all(map(math.isfinite, at)):
            rows.append(common | {"validity": "tokens were not counted"})
            continue
        common["last"] = at[-1]
        # No transition is claimed across weights that do not come from those before.
        stretch = np.searchsorted(breaks, steps, side="right")
        found = [
            one
            for part in np.unique(stretch)
            for one in fit(
                np.array(at)[stretch == part],
                np.array(numbers)[stretch == part],
                axis="log_step" if axis == "log_step" else "step",
                min_delta_bic=needed,
            )
            if abs(one.height) >= np.median(np.array(least)[stretch == part])
        ]
        rows += [common | _row(one) for one in found] or [common | {"validity": NONE}]
    return rows


def _row(found: Transition) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("direction", "n", *_NUMBERS)}


def _breaks(connection: Any) -> list[int]:
    """The first steps of weights that do not come from those before, whoever followed the run."""
    try:
        rows = connection.execute(
            "select step, digest, sketch from parameters where digest is not null order by step"
        ).fetchall()
    except (duckdb.CatalogException, duckdb.BinderException):
        # The table, or one of these fields, was not asked for.
        return []
    chain = Chain()
    return sorted(
        broken.since
        for step, digest, sketch in rows
        for broken in chain.take(step, digest, np.array(sketch, dtype=float))
    )


def _tokens(connection: Any) -> dict[int, float]:
    """The training tokens seen at each step."""
    views = connection.execute("select view_name from duckdb_views() where not internal")
    known: dict[int, float] = {}
    for (name,) in views.fetchall():
        columns = connection.execute(f'select * from "{name}" limit 0').description  # noqa: S608
        if {"step", "tokens"} <= {column[0] for column in columns}:
            rows = connection.execute(
                f'select distinct step, tokens from "{name}" where tokens is not null'  # noqa: S608
            ).fetchall()
            known |= {step: float(tokens) for step, tokens in rows}
    return known


def _first_ones(fits: pd.DataFrame) -> pd.DataFrame:
    """The first transition of each run, series and direction, of those whose midpoint is known."""
    known = fits[fits["direction"].notna() & fits["midpoint"].notna()]
    in_order = known.sort_values("midpoint", kind="stable")
    return in_order.drop_duplicates(["run", "series", "direction"])


def _named(row: dict[Any, Any]) -> str:
    return f"{row['series']} {row['direction']}"
