"""Transitions in series as they are measured: said at once, never with hindsight.

At each measurement `evidence.strongest` weighs a change that has just begun against smooth curves
with autocorrelated noise. Where it passes the threshold, a change is provisional; it is confirmed
where it still holds some measurements later, else retracted.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from monitor.transitions.evidence import WINDOW, strongest, went_back

State = Literal["provisional", "confirmed", "retracted"]
Direction = Literal["up", "down"]

CONFIRMED_AFTER = 3
"""A change is confirmed so many measurements after it was provisional, at the earliest: where the
evidence passes the threshold once more."""

HELD_FOR = 10
"""A change that has held for so many measurements is confirmed without more evidence."""

# score = level + slope log10(1 / alarms per 1,000 of one series) + more log10(measurements), as the
# more there are, the more changes are weighed; below `_FEW` they are weighed on little. See
# `tests/benchmarks/online_transitions.py`, `calibration`.
_LEVEL, _SLOPE, _MORE, _FEW = 3.15, 0.8, 0.64, 24


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


def threshold(false_alarms_per_1000: float, measurements: int) -> float:
    """The score that one series without a transition passes so often, at most.

    A straight line in the logarithms of the rate and of the measurements in the window. Above 1 per
    1,000 and below 24 measurements it stays as it is; below 0.05 it is an extrapolation.
    """
    rarity = max(-math.log10(false_alarms_per_1000), 0.0)
    return _LEVEL + _SLOPE * rarity + _MORE * math.log10(max(measurements, _FEW))


@dataclass(slots=True, kw_only=True)
class _Series:
    """The latest measurements of a series, and the change that is under way."""

    step: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    stderr: list[float] = field(default_factory=list)
    said: dict[str, Any] | None = None
    since: int = 0
    # Where most spoke for that change, of the measurements after it was said that do so again.
    again: dict[str, Any] | None = None
    # No onset before this step: what was retracted is not said again.
    not_before: float | None = None

    def add(self, step: float, value: float, stderr: float) -> None:
        for kept, new in ((self.step, step), (self.value, value), (self.stderr, stderr)):
            kept.append(new)
            del kept[:-WINDOW]

    def earliest(self) -> int:
        """Position of the first measurement at which a change may begin."""
        return 0 if self.not_before is None else bisect_left(self.step, self.not_before)

    def forget(self) -> None:
        for kept in (self.step, self.value, self.stderr):
            kept.clear()
        self.said, self.again, self.since, self.not_before = None, None, 0, None


class OnlineDetector:
    """Says of each measurement whether a change has begun, is confirmed or is retracted.

    A run without a transition gives about `false_alarms_per_1000` provisional events in 1,000
    measurements at most, of all its series together, and fewer that are confirmed: simulated with
    smooth trends, spikes, heavy tails, autocorrelations up to 0.9, random walks with and without
    noise on top, and noise that grows tenfold. After a confirmed change the past is forgotten: the
    next needs some measurements of its own before it.

    What fools it: a trend that bends within few measurements and has little noise, which is what
    the beginning of a transition looks like; and of a number anything that changes it, whatever the
    reason.

    In independent noise it finds nearly all of 5 standard deviations that take up to 9
    measurements, half of them within 3 after the midpoint, and nine of ten that take 20 (8 with
    heavy tails), the others being trends. Noise that remembers hides more: with an autocorrelation
    of 0.5 it finds 95% of steps, and a quarter of what takes 5 measurements is missed; with 0.9
    nearly half, and more where they take longer or are among 20 series.

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
        least: float | Mapping[str, float] | None = None,
    ) -> list[Event]:
        """Takes one measurement of one or many series, and returns what is new.

        Args:
            step: larger than those before.
            value: a number, or one for each series. A series may be absent, or nan, which is
                skipped.
            stderr: of the values, where each was measured independently of the others: the noise is
                at least as large.
            least: a change that begins is at least so high, where smaller ones do not matter.

        Raises:
            ValueError: the step does not increase, a value is infinite, or a standard error or a
                least height is negative.
        """
        step = self._later(step)
        values = value if isinstance(value, Mapping) else {"": value}
        errors = _sizes("standard error", values, stderr)
        heights = _sizes("least height", values, least)
        measured = {name: (_checked(name, values[name]), errors[name]) for name in values}
        self._last = step
        for name in measured:
            self._series.setdefault(name, _Series())
        alike: dict[tuple[float, ...], list[str]] = {}
        for name, (number, error) in measured.items():
            if math.isnan(number):
                continue
            series = self._series[name]
            series.add(step, number, error)
            alike.setdefault(tuple(series.step), []).append(name)
        of = {e.series: e for names in alike.values() for e in self._weighed(names, heights)}
        events = [of[name] for name in measured if name in of]
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

    def _weighed(self, names: list[str], least: Mapping[str, float]) -> list[Event]:
        """What is new of these series, which were measured at the same steps."""
        series = [self._series[name] for name in names]
        step = np.array(series[0].step)
        found = strongest(
            step,
            np.array([each.value for each in series]).T,
            np.array([each.stderr for each in series]).T,
            np.array([each.earliest() for each in series]),
            np.array([least[name] for name in names]),
        )
        needed = threshold(self._rate / len(self._series), len(step))
        events = []
        for at, (name, each) in enumerate(zip(names, series, strict=True)):
            score, height = float(found.score[at]), float(found.height[at])
            onset = float(step[found.onset[at]])
            direction: Direction = "up" if height > 0 else "down"
            if each.said is not None:
                same = direction == each.said["direction"]
                new = {"score": score if same else 0.0, "threshold": needed, "onset": onset}
                events += _judged(each, each.said, new)
            elif score >= needed:
                event = Event(
                    series=name,
                    state="provisional",
                    direction=direction,
                    step=each.step[-1],
                    onset=onset,
                    score=score,
                    threshold=needed,
                )
                each.said, each.since = asdict(event), 0
                events.append(event)
        return events


def _judged(series: _Series, said: dict[str, Any], new: dict[str, Any]) -> list[Event]:
    """Whether a provisional change is confirmed or retracted now."""
    series.since += 1
    again = series.again
    if new["score"] >= max(new["threshold"], again["score"] if again else 0.0):
        series.again = again = new
    begun, then = bisect_left(series.step, said["onset"]), bisect_left(series.step, said["step"])
    if went_back(np.array(series.value), begun, then, 1 if said["direction"] == "up" else -1):
        state: State = "retracted"
    elif series.since >= (CONFIRMED_AFTER if again else HELD_FOR):
        state = "confirmed"
    else:
        return []
    now = {"state": state, "step": series.step[-1]}
    if state == "confirmed":
        event = Event(**{**said, **(again or {}), **now})
        series.forget()
    else:
        event = Event(**{**said, **new, **now, "onset": said["onset"]})
        series.said, series.again, series.since = None, None, 0
        series.not_before = series.step[-1]
    return [event]


def _checked(name: str, value: float) -> float:
    value = float(value)
    if math.isinf(value):
        raise ValueError(
            f"series {name!r} is {value}; expected a finite number, or nan where there is none"
        )
    return value


def _sizes(
    what: str, values: Mapping[str, float], given: float | Mapping[str, float] | None
) -> dict[str, float]:
    """Of each series, 0 where none is given or known."""
    each = given if isinstance(given, Mapping) else dict.fromkeys(values, given)
    sizes = {}
    for name in values:
        size = float(each.get(name) or 0.0)
        if size < 0 or math.isinf(size):
            raise ValueError(
                f"the {what} of series {name!r} is {size}; expected a number of at least 0, or nan "
                "where it is not known"
            )
        sizes[name] = 0.0 if math.isnan(size) else size
    return sizes


def _copied(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: part.copy() if isinstance(part, (list, dict)) else part for key, part in kept.items()
    }
