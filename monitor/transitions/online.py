"""Transitions in series as they are measured: said at once, never with hindsight.

At each measurement `evidence.strongest` weighs a change that has just begun against smooth curves
with autocorrelated noise. Where it passes the threshold, a change is provisional; it is confirmed
where it still holds some measurements later, else retracted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from monitor.transitions.evidence import WINDOW, Evidence, clipped, strongest

State = Literal["provisional", "confirmed", "retracted"]
Direction = Literal["up", "down"]

HOLDS_FOR = 3
"""A change is confirmed so many measurements after it was provisional, at the earliest."""

GIVES_UP_AFTER = 12
"""A change that is not confirmed after so many measurements is retracted."""

_STRICTER = 0.5
_BEFORE = 8
"""So many measurements before the onset say from where the change started."""

# score = (intercept + slope log10(1 / alarms per 1,000 of one series)) (1 + steeper ρ²):
# `tests/benchmarks/online_transitions.py`, `calibration`.
_INTERCEPT, _SLOPE, _STEEPER = 4.4, 1.4, 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What was said of a series at one measurement.

    Attributes:
        series: which; `""` where only a number is given.
        state: `provisional`, `confirmed` or `retracted`.
        direction: of the change.
        step: when it was said.
        onset: the first step of the change, as far as was known at `step`.
        score: evidence for the change: of a normal deviate, the largest of many.
        threshold: what the score had to pass.
    """

    series: str
    state: State
    direction: Direction
    step: float
    onset: float
    score: float
    threshold: float


def threshold(false_alarms_per_1000: float, rho: float) -> float:
    """The score that one series without a transition passes so often, at most.

    A straight line in the logarithm of the rate, steeper with the autocorrelation, which is known
    less well the larger it is. Below 0.2 per 1,000 it is an extrapolation.
    """
    rarity = max(-math.log10(false_alarms_per_1000), 0.0)
    return (_INTERCEPT + _SLOPE * rarity) * (1 + _STEEPER * rho**2)


@dataclass(slots=True, kw_only=True)
class _Series:
    """The latest measurements of a series, and the change that is under way."""

    step: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    stderr: list[float] = field(default_factory=list)
    said: dict[str, Any] | None = None
    since: int = 0
    # Where most spoke for that change, since it was said.
    best: dict[str, Any] | None = None
    # No onset before this step: what was retracted is not said again.
    not_before: float | None = None

    def add(self, step: float, value: float, stderr: float) -> None:
        for kept, new in ((self.step, step), (self.value, value), (self.stderr, stderr)):
            kept.append(new)
            del kept[:-WINDOW]

    def forget(self) -> None:
        for kept in (self.step, self.value, self.stderr):
            kept.clear()
        self.said, self.best, self.since, self.not_before = None, None, 0, None


class OnlineDetector:
    """Says of each measurement whether a change has begun, is confirmed or is retracted.

    A run without a transition gives about `false_alarms_per_1000` provisional events in 1,000
    measurements at most, of all its series together, and fewer that are confirmed: simulated with
    smooth trends, spikes, heavy tails and autocorrelations up to 0.9, which come nearest to it.
    After a confirmed change the past is forgotten: the next needs some measurements of its own
    before it.

    What fools it: a trend that bends within few measurements looks like a transition when its
    noise is small beside it. A change that takes more than 20 measurements is often taken for a
    trend, and one of 5 standard deviations drowns in strong autocorrelation, or among 20 series.

    Example:
        >>> detector = OnlineDetector()
        >>> for step, value in enumerate([0, 0.1] * 15 + [3, 3.1] * 5):
        ...     for event in detector.update(step, value):
        ...         print(event.state, event.direction, event.step, event.onset)
        provisional up 31.0 30.0
        confirmed up 34.0 30.0

    Args:
        false_alarms_per_1000: provisional events expected in 1,000 measurements of a run, whatever
            the number of its series, without any transition.

    Raises:
        ValueError: the rate is not above 0.
    """

    def __init__(self, false_alarms_per_1000: float = 1.0) -> None:
        if not 0 < false_alarms_per_1000 < math.inf:
            raise ValueError(
                f"false_alarms_per_1000 is {false_alarms_per_1000}; expected a number above 0, "
                "such as 1"
            )
        self._rate = false_alarms_per_1000
        self._series: dict[str, _Series] = {}
        self._history: list[Event] = []
        self._last: float | None = None

    @property
    def history(self) -> tuple[Event, ...]:
        """All that was said, in its order; nothing is ever taken back but by a new event."""
        return tuple(self._history)

    def update(
        self,
        step: float,
        value: float | Mapping[str, float],
        *,
        stderr: float | Mapping[str, float] | None = None,
    ) -> list[Event]:
        """Takes one measurement of one or many series, and returns what is new.

        Args:
            step: larger than those before.
            value: a number, or one for each series. A series may be absent, or nan, which is
                skipped.
            stderr: of the values, where known: the noise is at least as large.

        Raises:
            ValueError: the step does not increase, a value is infinite, or a standard error is
                negative.
        """
        step = self._later(step)
        values = value if isinstance(value, Mapping) else {"": value}
        errors = stderr if isinstance(stderr, Mapping) else dict.fromkeys(values, stderr)
        measured = {}
        for name, number in values.items():
            error = errors.get(name)
            measured[name] = _checked(name, number, 0.0 if error is None else error)
        self._last = step
        for name in measured:
            self._series.setdefault(name, _Series())
        events = []
        for name, (number, error) in measured.items():
            if math.isnan(number):
                continue
            series = self._series[name]
            series.add(step, number, 0.0 if math.isnan(error) else error)
            events += self._weighed(name, series)
        self._history += events
        return events

    def break_chain(self, step: float) -> None:
        """Forgets the past of all series: what comes continues no measurement before `step`.

        A change that was provisional is retracted. The series and what was said stay.

        Raises:
            ValueError: the step is smaller than that of a measurement.
        """
        step = float(step)
        if math.isnan(step) or (self._last is not None and step < self._last):
            raise ValueError(
                f"the chain is broken at step {step}, after step {self._last} was measured; "
                "expected the step at which the new chain begins, at least the last one"
            )
        for series in self._series.values():
            if series.said is not None:
                self._history.append(Event(**{**series.said, "state": "retracted", "step": step}))
            series.forget()

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on, as a JSON document."""
        return {
            "false_alarms_per_1000": self._rate,
            "last": self._last,
            "series": {name: asdict(series) for name, series in self._series.items()},
            "history": [asdict(event) for event in self._history],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave.

        Raises:
            ValueError: it is not a state, or of a detector with another rate.
        """
        try:
            rate, last = state["false_alarms_per_1000"], state["last"]
            series = {name: _Series(**_copied(kept)) for name, kept in state["series"].items()}
            history = [Event(**event) for event in state["history"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is not the state of a detector ({error!r}): give what state() returned"
            ) from error
        if rate != self._rate:
            raise ValueError(
                f"the state is of a detector with false_alarms_per_1000={rate}, this one has "
                f"{self._rate}: build it with the same rate"
            )
        self._last, self._series, self._history = last, series, history

    def _later(self, step: float) -> float:
        step = float(step)
        if not math.isfinite(step) or (self._last is not None and step <= self._last):
            raise ValueError(
                f"step {step} arrived after step {self._last}: steps must increase; after a "
                "return to an earlier checkpoint, restore() the state that was kept with it"
            )
        return step

    def _weighed(self, name: str, series: _Series) -> list[Event]:
        step, value, stderr = (
            np.array(kept) for kept in (series.step, series.value, series.stderr)
        )
        earliest = 0
        if series.not_before is not None:
            earliest = int(np.searchsorted(step, series.not_before))
        found = strongest(step, value, stderr, earliest=earliest)
        needed = threshold(self._rate / len(self._series), found.rho if found else 0.0)
        if series.said is not None:
            return _judged(
                series, step, value, said=series.said, found=found, needed=needed + _STRICTER
            )
        if found is None or found.score < needed:
            return []
        event = Event(
            series=name,
            state="provisional",
            direction="up" if found.height > 0 else "down",
            step=series.step[-1],
            onset=float(step[found.onset]),
            score=found.score,
            threshold=needed,
        )
        series.said, series.since = asdict(event), 0
        series.best = _best(found.score, needed + _STRICTER, event.onset)
        return [event]


def _judged(
    series: _Series,
    step: Float[np.ndarray, " measurement"],
    value: Float[np.ndarray, " measurement"],
    *,
    said: dict[str, Any],
    found: Evidence | None,
    needed: float,
) -> list[Event]:
    """Whether a provisional change is confirmed or retracted now."""
    series.since += 1
    sign = 1 if said["direction"] == "up" else -1
    score, onset = 0.0, said["onset"]
    if found is not None and found.height * sign > 0:
        score, onset = found.score, float(step[found.onset])
    best = series.best or _best(0.0, needed, onset)
    if score - needed > best["score"] - best["threshold"]:
        best = _best(score, needed, onset)
    series.best = best
    enough = best["score"] >= best["threshold"]
    if _gone_back(step, value, said["onset"], said["step"], sign):
        state: State = "retracted"
    elif enough and series.since >= HOLDS_FOR:
        state = "confirmed"
    elif series.since >= GIVES_UP_AFTER:
        state = "retracted"
    else:
        return []
    now = {"state": state, "step": series.step[-1]}
    if state == "confirmed":
        event = Event(**{**said, **best, **now})
        series.forget()
    else:
        event = Event(**{**said, **now, "score": score, "threshold": needed})
        series.said, series.best, series.since = None, None, 0
        series.not_before = series.step[-1]
    return [event]


def _best(score: float, needed: float, onset: float) -> dict[str, Any]:
    return {"score": score, "threshold": needed, "onset": onset}


def _gone_back(
    step: Float[np.ndarray, " measurement"],
    value: Float[np.ndarray, " measurement"],
    onset: float,
    said: float,
    sign: int,
) -> bool:
    """Whether the latest values are nearer to where the change came from than to where it was."""
    y = clipped(value) * sign
    begun, then = int(np.searchsorted(step, onset)), int(np.searchsorted(step, said))
    before = float(np.median(y[max(begun - _BEFORE, 0) : max(begun, 1)]))
    reached = float(np.median(y[begun : then + 1]))
    return float(np.mean(y[-2:])) < (before + reached) / 2


def _checked(name: str, value: float, stderr: float) -> tuple[float, float]:
    value, stderr = float(value), float(stderr)
    if math.isinf(value):
        raise ValueError(
            f"series {name!r} is {value}; expected a finite number, or nan where there is none"
        )
    if stderr < 0 or math.isinf(stderr):
        raise ValueError(
            f"the standard error of series {name!r} is {stderr}; expected a number of at least 0, "
            "or nan where it is not known"
        )
    return value, stderr


def _copied(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: part.copy() if isinstance(part, (list, dict)) else part for key, part in kept.items()
    }
