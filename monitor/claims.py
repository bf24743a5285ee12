"""What is claimed of heads, and how sure a number must be before it counts.

A claim goes up in levels. `pattern`: attention looks right. `attribution`: what is written is right
too. `causal`: ablating the head's group hurts, and more than ablating any random group of its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from scipy.special import ndtr, stdtrit

from monitor.record import Field

LEVELS = ("none", "pattern", "attribution", "causal")

# What a graph of heads is called where, and only where, the claim on it is causal.
INDUCTION_CIRCUIT = "induction circuit"

# By how many standard deviations a number must differ from its null.
BEYOND = {
    "excess": 3.0,
    "eigenvalue_score": 3.0,
    "key_composition": 3.0,
    "contrast": 2.0,
    "over_random": 2.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its null and what is known of its uncertainty.

    `stderr` is that over `n` independent sequences, `null_sd` the spread of the null; None where
    there is no such thing.
    """

    value: float
    null: float
    stderr: float | None = None
    null_sd: float | None = None
    n: int

    @classmethod
    def of(cls, row: Mapping[Any, Any], field: str) -> Self | None:
        """The estimate of this field in a row, or None where it was not measured."""
        value, null = row.get(field), row.get(f"{field}_null")
        if value is None or null is None or row["validity"] != "ok":
            return None
        return cls(
            value=value,
            null=null,
            stderr=row.get(f"{field}_stderr"),
            null_sd=row.get(f"{field}_null_sd"),
            n=row["n"],
        )

    def margin(self, deviations: float, *, below: bool = False) -> float:
        """How far it lies above its null (or `below` it) and beyond so many standard deviations.

        With a standard error over n sequences the distance is that of Student's t which is as
        improbable: 3 deviations are 3.6 standard errors of 16 sequences. It is -inf for what is
        not finite, or of unknown uncertainty, as that of a single sequence is.
        """
        distance = self.null - self.value if below else self.value - self.null
        if self.null_sd is not None:
            noise = deviations * self.null_sd
        elif self.stderr is not None:
            noise = _distance(self.n, deviations) * self.stderr
        else:
            return -math.inf
        margin = distance - noise
        return margin if math.isfinite(margin) else -math.inf

    def beyond(self, deviations: float, *, below: bool = False) -> bool:
        """Whether it does so.

        >>> seen = Estimate(value=0.33, null=0.0, stderr=0.1, n=16)
        >>> seen.beyond(2.0), seen.beyond(3.0), seen.beyond(2.0, below=True)
        (True, False, False)
        """
        return self.margin(deviations, below=below) > 0


@functools.cache
def _distance(n: int, deviations: float) -> float:
    return float(stdtrit(n - 1, ndtr(deviations)))


def columns_of(field: Field, estimate: Estimate | None) -> dict[str, float | None]:
    """The entries of a field's columns in one row; None throughout for what was not measured."""
    if estimate is None:
        return dict.fromkeys(field.columns)
    parts = {"": "value", "_stderr": "stderr", "_null": "null", "_null_sd": "null_sd"}
    return {
        column: getattr(estimate, parts[column.removeprefix(field.name)])
        for column in field.columns
    }


def rows(columns: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of a probe's table, as it computed it, in plain Python; None: not measured.

    None of a table that is missing.

    >>> rows({"score": None, "n": [4, 4], "validity": ["ok", "ok"]})[1]
    {'score': None, 'n': 4, 'validity': 'ok'}
    """
    if columns is None:
        return []
    count = len(columns["validity"])
    plain = [_plain(values, count) for values in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]


def _plain(values: Any, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    if hasattr(values, "tolist"):
        return list(values.tolist())
    return [value.item() if hasattr(value, "item") else value for value in values]
