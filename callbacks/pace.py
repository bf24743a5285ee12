"""How much of a schedule a budget of time admits."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable

from callbacks.schedule import Schedule

_log = logging.getLogger("phasewatch")

# Where nobody says when training ends it is taken to go on for as long again, and at least so far.
_SHORTEST_TRAINING = 10_000

# Measurements whose median cost is taken for the next one's: one slow disk should not count.
_COSTS_KEPT = 5


class Pace:
    """Thins a schedule so that measuring takes at most a share `overhead` of the training time.

    Training is taken to begin now, at step `first`, and to end at step `last` (infinite: unknown).
    What the rest of it will take is projected from the steps so far. Where the points that remain
    do not fit into what is left of the budget, every k-th of them is admitted: the schedule keeps
    its shape, and the budget lasts to the end.

    Raises `ValueError` where `overhead` is no share; None is no limit.
    """

    def __init__(
        self,
        *,
        overhead: float | None,
        schedule: Schedule,
        first: int,
        last: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overhead = check_overhead(overhead)
        self._schedule = schedule
        self._first = first
        self._last = last
        self._clock = clock
        self._begun = clock()
        self._costs: deque[float] = deque(maxlen=_COSTS_KEPT)
        self._seen = (first, 0.0)
        self._refused = 0
        self._said = False

    def admits(self, step: int, *, spent: float, cost: float | None) -> bool:
        """Whether to measure at `step`, which is due.

        `spent` are the seconds that all measuring took so far, `cost` those of the latest
        measurement. The first one is always admitted.
        """
        if self._overhead is None or cost is None or step <= self._first:
            return True
        if not self._costs or cost != self._costs[-1]:
            self._costs.append(cost)
        trained = max(self._clock() - self._begun - spent, 0.0)
        last = self._last
        if math.isinf(last):
            last = max(_SHORTEST_TRAINING, 2 * step)
        projected = trained + self._seconds_per_step(step, trained) * max(last - step, 0)
        expected = statistics.median(self._costs)
        remaining = max(self._schedule.count(step, last), 1)
        affordable = (self._overhead * projected - spent) / max(expected, 1e-9)
        every = math.ceil(remaining / affordable) if affordable >= 1 else math.inf
        if self._refused + 1 >= every:
            self._refused = 0
            return True
        self._refused += 1
        self._say(expected, (spent + remaining * expected) / max(projected, 1e-9))
        return False

    def _seconds_per_step(self, step: int, trained: float) -> float:
        """The lesser of the means since the beginning and since the last point: steps warm up."""
        seen_step, seen_trained = self._seen
        overall = trained / (step - self._first)
        if step == seen_step:
            return overall
        self._seen = (step, trained)
        return min(overall, max(trained - seen_trained, 0.0) / (step - seen_step))

    def _say(self, cost: float, share: float) -> None:
        if not self._said:
            self._said = True
            _log.warning(
                "a measurement takes about %.3g s: the schedule (%s) would take about %.1f%% of "
                "the training time. To keep within overhead=%g only some of its points are "
                "measured, and every checkpoint (said once; overhead=None measures them all)",
                cost,
                self._schedule,
                100 * share,
                self._overhead,
            )


def check_overhead(overhead: float | None) -> float | None:
    """Returns `overhead`, or raises `ValueError` where it is neither a share nor None."""
    number = isinstance(overhead, float | int) and not isinstance(overhead, bool)
    if overhead is None or (number and 0 < overhead <= 1):
        return overhead
    raise ValueError(
        f"overhead={overhead!r}: expected the share of training time that measuring may take, "
        "above 0 and up to 1 (0.02 is 2%), or None for no limit"
    )
