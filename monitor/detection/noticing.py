"""Following the series of a run while it is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import duckdb

from monitor.detection.labels import Trained, label, trained_until
from monitor.detection.series import SERIES, Series, Value
from monitor.detection.table import Notice
from monitor.record import Failure, Measurement
from monitor.transitions import Event, OnlineDetector, Transition, fit

# A confirmed transition is fitted to so many of the latest measurements of its series: the time
# that this takes must not grow with the run.
_FITTED_TO = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Noticed:
    """What one measurement gave, and what failed."""

    notices: tuple[Notice, ...] = ()
    failures: tuple[Failure, ...] = ()


@dataclass(slots=True)
class _History:
    """All measurements of one series."""

    step: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)


class Noticing:
    """Says of the series of a run, measurement by measurement, when a transition begins, holds or
    goes back; never with hindsight.

    Args:
        series: what is followed.
        false_alarms: provisional transitions to expect of 1,000 measurements of a run without any,
            all series together.

    Raises:
        ValueError: two series have one name, or the rate is not above 0.
    """

    def __init__(self, series: Sequence[Series] = SERIES, *, false_alarms: float = 1.0) -> None:
        names = [each.name for each in series]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"series {', '.join(map(repr, twice))} are there more than once; expected a name "
                f"of its own for each, other than those that are followed anyway: "
                f"{', '.join(each.name for each in SERIES)}"
            )
        self._series = tuple(series)
        self._false_alarms = false_alarms
        self._detector = OnlineDetector(false_alarms)
        self._histories: dict[str, _History] = {}
        # By series, since when a transition has been provisional.
        self._pending: dict[str, float] = {}
        self._trained: list[Trained] = []
        self._connection = duckdb.connect(config={"threads": 1})

    @property
    def pending(self) -> Mapping[str, float]:
        """By series, the step since which a transition of it has been provisional."""
        return dict(self._pending)

    def replay(self, connection: duckdb.DuckDBPyConnection, *, until: int) -> None:
        """Takes what the tables of a connection say of a run up to a step, as if it was measured
        now; nothing is said of it.
        """
        self._trained = [one for one in trained_until(connection) if one.step <= until]
        by_step: dict[int, list[Value]] = {}
        for each in self._series:
            for step, values in _found(each, connection)[0].items():
                by_step.setdefault(step, []).extend(values)
        for step in sorted(by_step):
            if step <= until:
                self._take(step, by_step[step])

    def notice(self, measurement: Measurement) -> Noticed:
        """Takes a measurement, and says what is new."""
        step, failures = measurement.moment.step, []
        names = [reading.spec.name for reading in measurement.readings]
        for each in measurement.readings:
            self._connection.register(each.spec.name, each.table)
        try:
            values = []
            for series in self._series:
                by_step, error = _found(series, self._connection)
                values += by_step.get(step, [])
                failures += [] if error is None else [Failure.of(f"series {series.name}", error)]
            self._trained += trained_until(self._connection)
        finally:
            for name in names:
                self._connection.unregister(name)
        since = dict(self._pending)
        events = self._take(step, values)
        notices = tuple(self._notice(event, since) for event in events)
        return Noticed(notices=notices, failures=tuple(failures))

    def _take(self, step: int, values: Sequence[Value]) -> list[Event]:
        for value in values:
            history = self._histories.setdefault(value.series, _History())
            history.step.append(step)
            history.value.append(value.value)
        events = self._detector.update(step, {value.series: value.value for value in values})
        for event in events:
            if event.state == "provisional":
                self._pending[event.series] = event.step
            else:
                self._pending.pop(event.series, None)
        return events

    def _notice(self, event: Event, since: Mapping[str, float]) -> Notice:
        return Notice(
            event=event,
            detected_at=since.get(event.series, event.step),
            fitted=self._fitted(event) if event.state == "confirmed" else None,
            n=len(self._histories[event.series].step),
            searched=len(self._histories),
            false_alarms=self._false_alarms,
            label=label(self._trained, onset=event.onset, until=event.step),
        )

    def _fitted(self, event: Event) -> Transition | None:
        """The transition that an event is about, where the series shows it clearly by now."""
        history = self._histories[event.series]
        found = fit(history.step[-_FITTED_TO:], history.value[-_FITTED_TO:])
        alike = [one for one in found if one.direction == event.direction]
        return min(alike, key=lambda one: abs(one.onset - event.onset), default=None)


def _found(
    series: Series, connection: duckdb.DuckDBPyConnection
) -> tuple[dict[int, list[Value]], ValueError | None]:
    """The values of a series by step, and what went wrong with it."""
    try:
        return series.values(connection), None
    except ValueError as error:
        # Of our own series only those are there whose probes and fields were asked for.
        return {}, None if series in SERIES else error
