"""What may happen in a run, each kind with its rule for when it is there at one measurement.

A rule looks at one measurement alone: nothing is smoothed, and what comes later changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

# What was there is there until it is below so much of what it took to be.
_LINGERS = 2 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Whether an event was there, at every measurement of a run for every series (each head).

    `lingers` is where it is there, or so nearly that what was there before is not taken to be gone.
    `strength` orders the series where several may be named. `rows` has the row of the table behind
    each entry, -1 where there is none.
    """

    steps: Int[np.ndarray, " measurement"]
    held: Bool[np.ndarray, "measurement series"]
    lingers: Bool[np.ndarray, "measurement series"]
    measured: Bool[np.ndarray, "measurement series"]
    strength: Float[np.ndarray, "measurement series"]
    rows: Int[np.ndarray, "measurement series"]


@runtime_checkable
class Event(Protocol):
    """What may happen in a run, to be seen in one of its tables."""

    @property
    def name(self) -> str:
        """What it is called in the columns `event`."""

    @property
    def table(self) -> str:
        """The table in which it is seen."""

    @property
    def field(self) -> str:
        """The column of that table which the rule is about."""

    def see(self, frame: pd.DataFrame) -> Seen:
        """Applies the rule to the table of one run; `ValueError` where columns are missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passing:
    """A number leaves its null behind: by a share of its way, and beyond its uncertainty.

    Attributes:
        name: what the event is called.
        table: where the number is.
        field: which number; where its `validity` is not `ok` it does not count as measured.
        full: the value of what is wholly there: the way goes from the null to it, up or down.
        share: of that way, at least this much must be gone.
        deviations: by so many standard deviations the number must lie beyond its null; with a
            standard error over n sequences, the equally improbable distance of Student's t.
        null: the null of a field whose table has none.
        where: values of other columns, for rows of a table that mixes several kinds.
        by: dimensions that tell the series apart; those that the table lacks are left out.
    """

    name: str
    table: str
    field: str
    full: float = 1.0
    share: float = 0.1
    deviations: float = 3.0
    null: float | None = None
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by: tuple[str, ...] = ("layer", "head")

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or not self.deviations > 0:
            raise ValueError(
                f"event {self.name!r}: share is {self.share} and deviations {self.deviations}; "
                "expected a share above 0, at most 1, and more than 0 deviations"
            )

    def see(self, frame: pd.DataFrame) -> Seen:
        """Applies the rule to the table of one run.

        Raises:
            ValueError: columns are missing, or rows of one step cannot be told apart.
        """
        _expect(self, frame, [self.field, *self.where])
        rows = np.ones(len(frame), dtype=bool)
        for column, value in self.where.items():
            rows &= frame[column].eq(value).fillna(False).to_numpy(dtype=bool)
        value, null = _numbers(frame, self.field), self._null(frame)
        way = self.full - null
        with np.errstate(divide="ignore", invalid="ignore"):
            gone = (value - null) / way
            unsure, less = (
                self._noise(frame, deviations) / np.abs(way)
                for deviations in (self.deviations, _LINGERS * self.deviations)
            )
        measured = frame["validity"].eq("ok").to_numpy() & np.isfinite(gone) & np.isfinite(unsure)
        held = measured & (gone >= self.share) & (gone > unsure)
        lingers = measured & (gone >= _LINGERS * self.share) & (gone > less)
        said = {"held": held, "lingers": lingers, "measured": measured}
        return self._grid(frame, np.flatnonzero(rows), said, gone)

    def _null(self, frame: pd.DataFrame) -> Shaped[np.ndarray, " row"]:
        if f"{self.field}_null" in frame:
            return _numbers(frame, f"{self.field}_null")
        if self.null is None:
            raise ValueError(f"`{self.field}` has no null: give the event null=")
        return np.full(len(frame), self.null)

    def _noise(self, frame: pd.DataFrame, deviations: float) -> Shaped[np.ndarray, " row"]:
        """How far from its null a number may well lie by chance: so many standard deviations."""
        # Here, so that reading a table need not wait for scipy.
        from scipy.special import ndtr, stdtrit

        parts = []
        if f"{self.field}_stderr" in frame:
            n = _numbers(frame, "n")
            distance = stdtrit(np.where(n > 1, n - 1, np.nan), ndtr(deviations))
            parts.append(distance * _numbers(frame, f"{self.field}_stderr"))
        if f"{self.field}_null_sd" in frame:
            parts.append(deviations * _numbers(frame, f"{self.field}_null_sd"))
        if not parts:
            raise ValueError(f"`{self.field}` has neither a standard error nor a null_sd")
        noise: Shaped[np.ndarray, " row"] = np.sqrt(np.square(parts).sum(0))
        return noise

    def _grid(
        self,
        frame: pd.DataFrame,
        kept: Int[np.ndarray, " kept"],
        said: Mapping[str, Shaped[np.ndarray, " row"]],
        strength: Shaped[np.ndarray, " row"],
    ) -> Seen:
        by = [column for column in self.by if column in frame]
        at, steps = pd.factorize(frame["step"].iloc[kept], sort=True)
        if by:
            series = frame.iloc[kept].groupby(by, dropna=False).ngroup().to_numpy()
        else:
            series = np.zeros(len(kept), dtype=np.int64)
        rows = np.full((len(steps), int(series.max(initial=-1)) + 1), -1)
        rows[at, series] = kept
        if (rows >= 0).sum() < len(kept):
            raise ValueError(
                f"table `{self.table}` has several rows for {' and '.join(by) or 'a step'} at one "
                "step: tell them apart with where= or by="
            )
        there = rows >= 0
        return Seen(
            steps=steps.to_numpy(dtype=np.int64),
            **{name: column[rows] & there for name, column in said.items()},
            strength=np.where(there, strength[rows], np.nan),
            rows=rows,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A table says a word: where the test that it takes was not made, nothing is known.

    Attributes:
        name: what the event is called.
        table: where the word is said, on any row of a step.
        field: the column with the word.
        says: the word.
        test: a column that says whether the test was `passed`, `failed` or `not made`; a step at
            which it was not made counts as measured only where there was nothing to test.
        nothing: the word for that.
    """

    name: str
    table: str
    says: str
    field: str = "claim"
    test: str = "causal_test"
    nothing: str = "none"

    def see(self, frame: pd.DataFrame) -> Seen:
        """Applies the rule to the table of one run.

        Raises:
            ValueError: columns are missing.
        """
        _expect(self, frame, [self.field, self.test])
        word, test = frame[self.field], frame[self.test]
        rows = pd.DataFrame(
            {
                "step": frame["step"],
                "held": word.eq(self.says).fillna(False).astype(bool),
                "said": word.notna(),
                "nothing": word.eq(self.nothing).fillna(False).astype(bool) | word.isna(),
                "tested": test.notna() & test.ne("not made").fillna(False).astype(bool),
                "row": np.arange(len(frame)),
            }
        )
        steps = rows.groupby("step").agg(
            held=("held", "max"),
            said=("said", "max"),
            nothing=("nothing", "min"),
            tested=("tested", "max"),
            row=("row", "first"),
        )
        known = steps["said"] & (steps["held"] | steps["tested"] | steps["nothing"])
        return Seen(
            steps=steps.index.to_numpy(dtype=np.int64),
            held=steps[["held"]].to_numpy(dtype=bool),
            lingers=steps[["held"]].to_numpy(dtype=bool),
            measured=known.to_numpy(dtype=bool)[:, None],
            strength=steps[["held"]].to_numpy(dtype=float),
            rows=steps[["row"]].to_numpy(dtype=np.int64),
        )


# A tenth of the way is where the rise of a transition is seen first, at the least hindsight. The
# way of in-context learning is a nat by convention: of a score in nats nothing is the whole.
EVENTS: tuple[Event, ...] = (
    Passing(name="previous-token head", table="induction", field="previous_token"),
    Passing(name="induction head", table="induction", field="prefix_matching"),
    Passing(name="in-context learning", table="in_context", field="paired_score", full=-1.0),
    Claim(name="induction circuit", table="circuit", says="induction circuit"),
)


def _expect(event: Passing | Claim, frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [f"`{column}`" for column in columns if column not in frame]
    if missing:
        raise ValueError(f"table `{event.table}` has no column {', '.join(missing)}")


def _numbers(frame: pd.DataFrame, column: str) -> Shaped[np.ndarray, " row"]:
    numbers: Shaped[np.ndarray, " row"] = frame[column].to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers
