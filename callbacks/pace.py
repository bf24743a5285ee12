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

# The first steps load, allocate and compile: they say little about those to come, other than that
# they may well be so many times as fast.
_WARM_UP_STEPS = 3
_WARM_UP_FACTOR = 10

# How long a training is taken to be at least, where nobody says when it ends.
_UNKNOWN_LAST = 10_000

# Among so many measurements the cost of one that waited for a slow disk is not taken for granted.
_COSTS_KEPT = 5


class Pace:
    """Thins a schedule so that measuring takes at most a share of the training time.

    Before each measurement that is due it projects how long training will take, and so what is left
    of the budget. Where that pays for all that is still due, this one is made; else as large a part
    of them as it pays for, evenly among what is due, so that a schedule keeps its shape and the
    budget lasts to the end. Nothing is admitted that the projected training would not pay for. The
    first measurement is: nobody knows what it takes before. Those for checkpoints are not asked
    for; they count as well, and as many for each step are expected of the steps to come.

    Interventions have a `reserve` of the budget, and what is left when all that is still due is
    paid for: `grant` spreads that evenly over what is due, and what is not spent is saved up. They
    are not part of what a measurement is taken to cost.

    While only the first steps are known, which are slow, steps are taken to be ten times as fast as
    those, and measured where even then all that is due fits.
    Where the end is unknown, 10,000 steps are counted on, and beyond them only what was trained.

    Args:
        overhead: seconds of measuring for each second of training; None: everything is admitted.
        reserve: the share of that which is kept for interventions.
        schedule: what is to be thinned.
        first: the step at which training begins, now.
        last: the step at which it ends; infinity: unknown.
        clock: gives seconds.

    Raises:
        ValueError: `overhead` is no share.
    """

    def __init__(
        self,
        *,
        overhead: float | None,
        schedule: Schedule,
        first: int,
        last: float,
        reserve: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._overhead = check_overhead(overhead)
        self._schedule = schedule
        self._first = first
        self._last = last
        self._reserve = reserve
        self._clock = clock
        self._begun = clock()
        self._spent = 0.0
        self._intervened = 0.0
        self._costs: deque[float] = deque(maxlen=_COSTS_KEPT)
        # Whether the next measurement is one that was admitted.
        self._admitted = True
        self._for_checkpoints = 0
        self._extra = 0
        self._part = 0.0
        self._held_back = False
        self._said = False
        # Steps after the warm-up and the seconds trained until them; each twice as far as the last.
        self._marks: list[tuple[int, float]] = []

    def reach(self, step: int) -> None:
        """Takes note that training has come to `step`; to be called at every step."""
        after = self._first + _WARM_UP_STEPS
        if step >= after and (not self._marks or step - after > 2 * (self._marks[-1][0] - after)):
            self._marks.append((step, self._trained()))

    def spend(self, seconds: float, intervening: float = 0.0) -> None:
        """Takes note of what a measurement took, admitted or not, and of how much of that went into
        interventions.
        """
        self._spent += seconds
        self._intervened += intervening
        self._costs.append(max(0.0, seconds - intervening))
        self._for_checkpoints += not self._admitted
        self._admitted = False

    def admits(self, step: int) -> bool:
        """Whether what is due at `step` is measured."""
        if self._overhead is None or not self._costs:
            self._admitted = True
            return True
        payable = self._payable(step, self._overhead * (1 - self._reserve))
        # This one at least is due: several steps may have been taken at a time.
        due = max(1, self._schedule.count(step, self._horizon(step)))
        if self._step_seconds(step) is None:
            # Too little is known to say which part of them will be paid for.
            self._admitted = payable >= due
            self._held_back |= not self._admitted
            return self._admitted
        self._part = min(1.0, self._part + max(0.0, payable / due))
        # Up to rounding: three thirds make a whole.
        self._admitted = payable >= 1 and self._part > 1 - 1e-9
        if self._admitted:
            self._part -= 1
        else:
            self._say(step)
        return self._admitted

    def foresees(self, step: int) -> bool:
        """Whether one at `step`, which is yet to be trained, will be admitted, as it looks now;
        where that is not clear, yes.
        """
        if self._overhead is None or not self._costs:
            return True
        payable = self._payable(step, self._overhead * (1 - self._reserve))
        due = max(1, self._schedule.count(step, self._horizon(step)))
        return payable > 0.99 and self._part + payable / due > 0.99

    def admits_extra(self, step: int) -> bool:
        """Whether the budget pays for one at `step` that the schedule has not: what it takes is
        missing later.
        """
        self._admitted = (
            self._overhead is None
            or not self._costs
            or self._payable(step, self._overhead * (1 - self._reserve)) >= 1
        )
        self._extra += self._admitted
        return self._admitted

    def grant(self, step: int) -> float:
        """The seconds that interventions may take at `step`.

        None are granted at the first measurement: nobody knows what it takes before.
        """
        if self._overhead is None:
            return math.inf
        if not self._costs:
            return 0.0
        left = max(1, self._schedule.count(step, self._horizon(step)))
        due = max(left, self._schedule.count(self._first, self._horizon(step)))
        core = min(left, self._payable(step, self._overhead * (1 - self._reserve)))
        free = (self._payable(step, self._overhead) - max(0.0, core)) * self._cost()
        # A share of what all interventions may take: as large as what is reached of what is due.
        return max(0.0, free * (due - left + 1) / due - self._intervened)

    def finish(self, step: int) -> None:
        """Says what it did where training ended before the length of a step was known."""
        if self._held_back and self._step_seconds(step) is None:
            self._say(step)

    def _payable(self, step: int, overhead: float) -> float:
        """How many more measurements the budget pays for, those for checkpoints aside, and what
        interventions have taken.
        """
        left = overhead * self._projected(step) - (self._spent - self._intervened)
        taken, to_take = step - self._first, self._horizon(step) - step
        return left / self._cost() - self._for_checkpoints / max(1, taken) * to_take

    def _cost(self) -> float:
        """What the next measurement will take: hopeful, since one too many is soon made up for, but
        nothing is learnt from one that is not made.
        """
        return max(min(self._costs[-1], statistics.median(self._costs)), 1e-9)

    def _horizon(self, step: int) -> float:
        return max(step, _UNKNOWN_LAST if math.isinf(self._last) else self._last)

    def _trained(self) -> float:
        return max(self._clock() - self._begun - self._spent, 1e-9)

    def _projected(self, step: int) -> float:
        """Seconds that the whole training takes, measuring left out."""
        each = self._step_seconds(step)
        if each is None:
            each = self._trained() / max(1, step - self._first) / _WARM_UP_FACTOR
        return self._trained() + (self._horizon(step) - step) * each

    def _step_seconds(self, step: int) -> float | None:
        """What a step takes: the mean since warm-up, or of at least the last half where that is
        less; None: only the first steps are known.
        """
        trained = self._trained()
        since = [self._marks[0], self._marks[max(0, len(self._marks) - 2)]] if self._marks else []
        return min(((trained - t) / (step - at) for at, t in since if step > at), default=None)

    def _say(self, step: int) -> None:
        if self._said:
            return
        self._said = True
        projected, cost = self._projected(step), self._cost()
        due = self._schedule.count(self._first, self._horizon(step))
        besides = f", besides {self._extra} around transitions" if self._extra else ""
        kept = f", {self._reserve:.0%} of it for interventions," if self._reserve else ""
        _log.warning(
            "measuring takes %s and a training step %s: all %d points of the schedule (%s) would "
            "take %.1f%% of the training time%s. To keep within overhead=%g%s some are passed "
            "over, and no checkpoint (said once; overhead=None measures them all, a sparser "
            "schedule= chooses among them)",
            _readable(cost),
            _readable(projected / max(1.0, self._horizon(step) - self._first)),
            due,
            self._schedule,
            100 * due * cost / projected,
            besides,
            self._overhead,
            kept,
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


def _readable(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
