"""How much of a schedule an overhead budget admits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from callbacks.schedule import Schedule

# The first steps load, allocate and compile: they say little about those to come.
_WARM_UP_STEPS = 3
# What a step may turn out to be shorter by, as long as nothing but those is known.
_WARM_UP_FACTOR = 10
# How long a training is taken to be at least, where its end is not known.
_UNKNOWN_LAST = 10_000


def check_overhead(overhead: float | None) -> float | None:
    """The share of the training time that measuring may take, if it can be one.

    Raises `ValueError` where it is no share between 0 and 1.
    """
    whole = isinstance(overhead, int | float) and not isinstance(overhead, bool)
    if overhead is not None and not (whole and 0 < overhead <= 1):
        raise ValueError(
            f"overhead={overhead!r}: expected the share of the training time that measuring may "
            "take, above 0 and at most 1 (0.02 is 2%), or None for no limit"
        )
    return overhead


class Pace:
    """Thins a schedule so that measuring takes at most a share of the training time.

    Before each measurement that is due it projects how long training will take, and what is left
    of the budget. Where that pays for all measurements still due, this one is made; else as large
    a part of them as it pays for, evenly among those that are due: a schedule keeps its shape. No
    measurement is made that the projected training would not pay for, so that the share holds at
    the end; the first is always made, as nobody knows what it takes before.

    Measurements for checkpoints are not asked for and count as well; as many for each step as there
    were so far are expected of the steps to come.

    Where the last step is unknown, 10,000 steps are counted on, and beyond those nothing but what
    was trained already. While only the first steps are known, which are slow, later ones are taken
    to be 10 times as fast.

    Args:
        schedule: what is to be thinned.
        overhead: seconds of measuring for each second of training; None: everything is admitted.
        step: where training begins, now.
        last: the step at which it ends; infinity: unknown.
        clock: gives seconds.
    """

    def __init__(
        self,
        schedule: Schedule,
        overhead: float | None,
        *,
        step: int,
        last: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._schedule = schedule
        self._overhead = check_overhead(overhead)
        self._last = last
        self._clock = clock
        self._first_step = step
        self._begun = clock()
        self._cost: float | None = None
        self._part = 0.0
        self._passed_over = 0
        self._admitted = True
        self._for_checkpoints = 0
        self._said = False
        # Steps and the training seconds at them, each as far from the first as all before.
        self._marks: list[tuple[int, float]] = []
        self.spent = 0.0

    def spend(self, seconds: float) -> None:
        """Takes note of a measurement, which was admitted or made for a checkpoint."""
        self.spent += seconds
        self._cost = seconds
        self._for_checkpoints += not self._admitted
        self._admitted = False

    def reach(self, step: int) -> None:
        """Takes note that training has come to `step`; to be called at every step."""
        since = step - self._first_step - _WARM_UP_STEPS
        if since >= 0 and (not self._marks or since >= 2 * self._since_warm_up(-1) + 1):
            self._marks.append((step, self._trained()))

    def admits(self, step: int) -> bool:
        """Whether what is due at `step` is measured."""
        if self._overhead is None or self._cost is None:
            self._admitted = True
        else:
            payable = self._payable(step, self._overhead, self._cost)
            # This one at least is due: several steps may have been taken at a time.
            due = max(1, self._schedule.count(step, self._horizon(step)))
            self._part = min(1.0, self._part + max(0.0, payable / due))
            # Up to rounding: three thirds make a whole.
            self._admitted = payable >= 1 and self._part > 1 - 1e-9
            self._part -= self._admitted
            self._passed_over += not self._admitted
        return self._admitted

    def _payable(self, step: int, overhead: float, cost: float) -> float:
        """How many more measurements the budget pays for, those for checkpoints aside."""
        left = overhead * self._projected(step) - self.spent
        taken, to_take = step - self._first_step, self._horizon(step) - step
        for_checkpoints = self._for_checkpoints / max(1, taken) * to_take
        return left / max(cost, 1e-9) - for_checkpoints

    def notice(self, step: int, *, final: bool = False) -> str | None:
        """What to tell the user, once: that measurements are passed over, with figures.

        Only when the length of a step is known, or at the end (`final`).
        """
        if self._said or not self._passed_over or self._overhead is None or self._cost is None:
            return None
        if not final and self._recent_step(step) is None:
            return None
        self._said = True
        trained = max(self._projected(step), 1e-9)
        due = self._schedule.count(self._first_step, self._horizon(step))
        steps = max(1.0, self._horizon(step) - self._first_step)
        return (
            f"measuring takes {_seconds(self._cost)} and a training step "
            f"{_seconds(trained / steps)}: all {due} measurements of the schedule "
            f"({self._schedule}) would take {due * self._cost / trained:.1%} of the training time. "
            f"Measurements are passed over to keep to overhead={self._overhead:g} "
            f"({self._passed_over} so far); those of checkpoints are always made. "
            "overhead=None makes all of them, a sparser schedule= chooses which"
        )

    def _horizon(self, step: int) -> float:
        return max(step, _UNKNOWN_LAST) if math.isinf(self._last) else max(step, self._last)

    def _trained(self) -> float:
        return self._clock() - self._begun - self.spent

    def _projected(self, step: int) -> float:
        """Seconds that the whole training takes, measuring left out."""
        recent = self._recent_step(step)
        if recent is None:
            recent = self._trained() / max(1, step - self._first_step) / _WARM_UP_FACTOR
        return self._trained() + (self._horizon(step) - step) * recent

    def _recent_step(self, step: int) -> float | None:
        """Seconds that a step takes: the mean since warm-up, or lately where that is less."""
        now = self._trained()
        # The last half at least, so that a pause does not count for more than it lasts.
        since = [self._marks[0], self._marks[max(0, len(self._marks) - 2)]] if self._marks else []
        return min(((now - t) / (step - at) for at, t in since if step > at), default=None)

    def _since_warm_up(self, index: int) -> int:
        return self._marks[index][0] - self._first_step - _WARM_UP_STEPS


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
