"""When to measure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Measure at each of `steps`, and at every multiple of `every` beyond `after`."""

    steps: frozenset[int] = frozenset()
    every: int | None = None
    after: int = -1

    @classmethod
    def of(cls, wanted: int | Iterable[int] | None) -> Schedule:
        """The schedule that a user asked for.

        None: steps 0, 1, 2, 4, … 512 and then every 1,000, the checkpoints of the Pythia suite
        (Biderman et al. 2023). A number: every so many steps, from step 0 on. Several numbers:
        exactly those steps. Raises `ValueError` where that never fires.
        """
        if wanted is None:
            return cls(steps=frozenset([0, *(2**k for k in range(10))]), every=1_000, after=512)
        expected = "expected a number of steps (at least 1), a list of steps, or None"
        if type(wanted) is int and wanted > 0:
            return cls(every=wanted)
        if isinstance(wanted, Iterable) and not isinstance(wanted, str | bytes):
            steps = list(wanted)
            if steps and all(type(step) is int and step >= 0 for step in steps):
                return cls(steps=frozenset(steps))
        raise ValueError(f"schedule={wanted!r} never fires: {expected}")

    def __str__(self) -> str:
        parts = []
        if self.steps:
            parts.append(f"at {', '.join(map(str, sorted(self.steps)))}")
        if self.every is not None:
            after = f" beyond {self.after}" if self.after >= 0 else ""
            parts.append(f"every {self.every} steps{after}")
        return " and ".join(parts)

    def due(self, step: int, since: int) -> bool:
        """Whether anything is due after step `since` and up to `step`."""
        at_step = any(since < planned <= step for planned in self.steps)
        return at_step or self._next_multiple(max(since, self.after)) <= step

    def count(self, first: int, last: float) -> int:
        """How many points there are from step `first` to step `last`."""
        points = sum(first <= planned <= last for planned in self.steps)
        if self.every is None:
            return points
        before = max(first - 1, self.after)
        return points + max(0, int(last) // self.every - before // self.every)

    def check_fires(self, last: float) -> None:
        """Raises `ValueError` where nothing is due up to step `last`, step 0 of multiples aside."""
        at_step = any(planned <= last for planned in self.steps)
        if not at_step and self._next_multiple(max(0, self.after)) > last:
            raise ValueError(
                f"schedule ({self}) never fires in this training, which ends at step {last:.0f}: "
                "pass a smaller schedule="
            )

    def _next_multiple(self, step: int) -> float:
        return math.inf if self.every is None else (step // self.every + 1) * self.every


class Denser:
    """Measures more often while a transition is provisional: so many times for each of the gaps
    before, so that what begins is confirmed, or goes back, sooner, and is seen in more detail.

    Args:
        first: the step at which training begins, now.
    """

    _TIMES = 4
    # Where nothing is decided by then, it will not be decided sooner by more of the same.
    _MOST = 12

    def __init__(self, *, first: int) -> None:
        self._measured = first
        self._every: int | None = None
        self._left = 0

    def measured(self, step: int, *, pending: bool) -> None:
        """Takes note of a measurement at `step`, and whether a transition is provisional then."""
        if not pending:
            self._every = None
        elif self._every is None:
            self._every, self._left = max(1, (step - self._measured) // self._TIMES), self._MOST
        else:
            self._left -= 1
        self._measured = step

    def due(self, step: int) -> bool:
        """Whether one is due at `step` besides those of the schedule."""
        return self._every is not None and self._left > 0 and step >= self._measured + self._every
