"""What formed in which run, and how universal that is, for people: in a terminal, or as plain text.

Every part can be narrow: tables fold their cells, and sentences wrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.across.fitted import apart, early_warnings
from monitor.across.pooled import Axis, leads, universality

_PLAIN_WIDTH = 160

_SEEN = "A lead compares when things were seen: what has the larger standard error is seen later."


def console() -> Console:
    """Writes to stdout: as wide as the terminal, or in whole lines where there is none."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def print_formations(to: Console, formations: pd.DataFrame) -> None:
    """For each run a line for each event, and below the reasons of what cannot be said."""
    for run, rows in formations.groupby("run", sort=False):
        to.print(Text(_heading(str(run), rows), "bold"))
        table = _table("event", "step", "tokens", "head", "at the end ± 95%")
        for row in rows[rows["formed"].notna()].to_dict("records"):
            table.add_row(row["event"], *_when(row), _head(row), _value(row))
        to.print(table if table.row_count else "nothing can be said of it")
        to.print()
    _print_sentences(to, _reasons(formations))


def print_universality(to: Console, formations: pd.DataFrame, axis: Axis) -> None:
    """A line for each event, and below a sentence on each that followed on another."""
    unit = {"step": "step", "tokens": "training tokens"}[axis]
    table = _table("event", "formed", "95% interval", f"median {unit}", "range", "within")
    pooled = universality(formations, axis)
    for row in pooled[pooled["runs"] > 0].to_dict("records"):
        known = row["timed"] > 0
        table.add_row(
            row["event"],
            f"{row['formed']} of {row['runs']} runs",
            f"{row['share_low']:.0%} to {row['share_high']:.0%}",
            count(row["median"]) if known else "-",
            f"{count(row['least'])} to {count(row['most'])}" if known else "-",
            count(row["resolution"]) if known else "-",
        )
    to.print(table)
    _print_sentences(to, _caveats(pooled, unit))
    order = leads(formations, axis).query("runs > 0")
    _print_sentences(to, map(_lead, order.to_dict("records")))
    if len(order):
        to.print(Text(_SEEN, "dim"))


def print_fits(to: Console, fits: pd.DataFrame, axis: str) -> None:
    """For each run a line for each transition, how far apart they are, and what those that led in
    the other runs say of what may follow.
    """
    unit = "tokens" if axis == "tokens" else "steps"
    for run, rows in fits.groupby("run", sort=False):
        to.print(Text(f"{run}: {rows['searched'].iloc[0]} series searched", "bold"))
        found = rows[rows["direction"].notna()].sort_values("midpoint", na_position="last")
        table = _table("series", "onset", "midpoint", "end", "width", "height", "ΔBIC")
        for row in found.to_dict("records"):
            table.add_row(
                f"{row['series']} {row['direction']}",
                *(_between(row, name) for name in ("onset", "midpoint", "end", "width")),
                _between(row, "height", _figure),
                f"{row['delta_bic']:.0f}",
            )
        to.print(table if table.row_count else "no transition that a smooth curve does not explain")
        _print_sentences(to, _unclear(found))
        _print_sentences(to, _order(apart(found), unit))
        _print_sentences(to, _warnings(early_warnings(fits, str(run)), unit))
        to.print()


def _between(row: dict[Any, Any], name: str, shown: Callable[[float], str] | None = None) -> str:
    """A number of a fit, and its 95% interval; what lies outside the measurements is open."""
    shown = shown or count
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if not all(map(math.isfinite, (value, low, high))):
        return "outside"
    return f"{shown(value)} ({shown(low)} to {shown(high)})"


def _figure(number: float) -> str:
    return f"{number:.3g}"


def _unclear(found: pd.DataFrame) -> Iterator[str]:
    for row in found[found["validity"].ne("ok")].to_dict("records"):
        yield f"{row['series']} {row['direction']}: {row['validity']}."


def _order(pairs: pd.DataFrame, unit: str) -> Iterator[str]:
    """One sentence for each transition and the next one after it."""
    after = pairs.drop_duplicates("first")
    for row in after.to_dict("records"):
        apart_by = f"{count(row['lead_low'])} to {count(row['lead_high'])} {unit}"
        if row["sure"]:
            yield f"{row['first']} before {row['then']}, by {apart_by}."
        else:
            yield f"{row['first']} and {row['then']}: too close to tell ({apart_by})."


def _warnings(expected: pd.DataFrame, unit: str) -> Iterator[str]:
    for row in expected.to_dict("records"):
        yield (
            f"{row['moved']} came before {row['outcome']} in {row['followed']} of {row['runs']} "
            f"other runs ({row['share_low']:.0%} to {row['share_high']:.0%}), by "
            f"{count(row['least'])} to {count(row['most'])} {unit}: here that would be at "
            f"{count(row['expected'])} or so."
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_sentences(to: Console, sentences: Iterator[str]) -> None:
    for sentence in sentences:
        to.print(Text(sentence))


def _heading(run: str, rows: pd.DataFrame) -> str:
    parts = []
    for column, said in (
        ("seed", "probes' seed {}"),
        ("parameters", "{:,} parameters"),
        ("step_last", "watched until step {:,}"),
    ):
        known = rows[column].dropna()
        parts += [said.format(known.max())] if len(known) else []
    return f"{run}: {', '.join(parts)}" if parts else run


def _when(row: dict[Any, Any]) -> tuple[str, str]:
    if not row["formed"]:
        return f"not by {row['step_last']:,}", "-"
    tokens = "-" if pd.isna(row["tokens_by"]) else count(row["tokens_by"])
    if pd.isna(row["step"]):
        return f"by {row['step_by']:,}", tokens
    return f"{row['step']:,} (after {row['step_after']:,})", tokens


def _head(row: dict[Any, Any]) -> str:
    return "-" if pd.isna(row["head"]) else f"{row['layer']}.{row['head']}"


def _value(row: dict[Any, Any]) -> str:
    if pd.isna(row["value"]):
        return "-"
    from scipy.special import stdtrit

    shown = f"{row['value']:.2f}"
    if pd.notna(row["value_stderr"]):
        shown += f" ± {stdtrit(row['n'] - 1, 0.975) * row['value_stderr']:.2f}"
    return shown if pd.isna(row["value_null"]) else f"{shown} (null {row['value_null']:.2f})"


def _reasons(formations: pd.DataFrame) -> Iterator[str]:
    """What is behind what is not a plain yes or no."""
    noted = formations[formations["validity"].ne("ok")]
    for (event, why), rows in noted.groupby(["event", "validity"], sort=False):
        runs = ", ".join(rows["run"])
        if len(rows) == formations["run"].nunique() and len(rows) > 1:
            runs = f"all {len(rows)} runs"
        yield f"{event}: {why} ({runs})."


def _caveats(pooled: pd.DataFrame, unit: str) -> Iterator[str]:
    for row in pooled.to_dict("records"):
        if row["runs"] and row["unknown"]:
            yield f"{row['event']}: of {row['unknown']} more nothing can be said."
        if row["runs"] and row["validity"] != "ok":
            yield f"{row['event']}: not on one axis: {row['validity']}."
        if 0 < row["timed"] < row["formed"]:
            yield (
                f"{row['event']}: the median is of {row['timed']} runs; when it formed in the "
                f"{row['formed'] - row['timed']} others is not known."
            )
        if row["formed"] < row["runs"] and pd.notna(row["watched"]):
            yield (
                f"{row['event']}: the runs that did not form it were watched until {unit} "
                f"{count(row['watched'])} at least."
            )


def _lead(row: dict[Any, Any]) -> str:
    order = f"{row['before']} of {row['runs']} runs"
    other = [f"after it in {row['after']}"] if row["after"] else []
    other += [f"too close to tell in {row['unclear']}"] if row["unclear"] else []
    said = f"{row['first']} before {row['then']} in {'; '.join([order, *other])}"
    if not row["timed"]:
        return f"{said}."
    unit = {"step": "steps", "tokens": "tokens"}[row["axis"]]
    return (
        f"{said}: by {count(row['median'])} {unit} in the median ({count(row['least'])} to "
        f"{count(row['most'])}), each known to within {count(row['resolution'])}."
    )


def count(number: float) -> str:
    """A number of steps or tokens, in three or four figures where it is large.

    >>> [count(number) for number in (1_060, 412_800, 1_279_680, -9_876_543_210, 999_999)]
    ['1,060', '412.8k', '1.280M', '-9.877B', '1.000M']
    """
    if abs(number) < 100_000:
        return f"{number:,.0f}"
    rounded = float(f"{number:.3e}")
    thousands = min(int(math.log10(abs(rounded)) // 3), 4)
    return f"{rounded / 1000**thousands:#.4g}{' kMBT'[thousands]}"
