"""Numbers and transitions as a terminal tells them, live in the demo and of any run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from monitor.terminal.drawing import sparkline

# A row of a table, from Arrow or from pandas.
Row = Mapping[Any, Any] | pd.Series


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number with half of its 95% interval, its null, and how it went until now.

    `why` says why there is none, where it cannot be interpreted.
    """

    name: str
    value: float = math.nan
    half_width: float = math.nan
    null: float = math.nan
    history: Sequence[float] = ()
    why: str = ""

    @classmethod
    def of(cls, name: str, row: Row, field: str, history: Sequence[float]) -> Number:
        """A field of a row, or why that cannot be interpreted."""
        if row["validity"] != "ok":
            return cls(name=name, why=plain(row["validity"]), history=history)
        return cls(
            name=name,
            value=float(row[field]),
            half_width=half_width(row, field),
            null=float(row.get(f"{field}_null", math.nan)),
            history=history,
        )

    @property
    def interval(self) -> str:
        """The value and its uncertainty.

        >>> Number(name="", value=-0.27, half_width=0.204).interval
        '-0.27 ± 0.20'
        >>> Number(name="", value=5.0).interval
        '5.00 ± ?'
        """
        if math.isnan(self.value):
            return "-"
        around = "?" if math.isnan(self.half_width) else f"{self.half_width:.2f}"
        return f"{self.value:.2f} ± {around}"

    def __str__(self) -> str:
        return f"{self.name} {self.interval}"


def half_width(row: Row, field: str) -> float:
    """Half of the 95% confidence interval of a field, from Student's t over `n` sequences; NaN
    where that is not known.
    """
    error, n = row.get(f"{field}_stderr"), row["n"]
    if error is None or n is None or not n > 1:
        return math.nan
    return float(stdtrit(int(n) - 1, 0.975) * error)


def numbers_table(numbers: Sequence[Number], width: int) -> Table:
    """One line a number, with a sparkline of at most `width` characters."""
    nulls = ["" if math.isnan(one.null) else f"{one.null:.2f}" for one in numbers]
    table = Table(box=None, expand=True, padding=(0, 1))
    # Where it is narrow names are cut, and numbers are not.
    table.add_column("", no_wrap=True)
    for heading, cells in (("now ± 95%", [one.interval for one in numbers]), ("null", nulls)):
        least = max(map(len, [heading, *cells]))
        table.add_column(heading, justify="right", no_wrap=True, min_width=least)
    table.add_column("since the start", width=width, no_wrap=True)
    for one, null in zip(numbers, nulls, strict=True):
        beside = Text(one.why, "dim") if one.why else Text(sparkline(one.history, width), "cyan")
        table.add_row(Text(one.name), Text(one.interval, "bold"), Text(null, "dim"), beside)
    return table


def said(row: Row) -> str:
    """What a row of the table `transitions` says, but for the step at which it was said."""
    if row["kind"] == "break":
        return plain(f"{row['series']} broken at step {row['began']:,.0f}: {row['label']}")
    way = f" {row['direction']}" if row["kind"] == "change" else ""
    why = f" ({row['label']})" if row["label"] else ""
    return plain(f"{row['series']}{way} since step {row['began']:,.0f}: {row['state']}{why}")


def called(concept: str) -> str:
    """A concept's name in a sentence."""
    return plain(concept.replace("_", " "))


def plain(text: object) -> str:
    r"""Text of a file or a folder as it may be shown: nothing in it can steer the terminal.

    >>> plain("run\x1b[2J")
    'run?[2J'
    """
    return "".join(c if c.isprintable() else "?" for c in str(text))
