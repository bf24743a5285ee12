"""Following the series of a run while it is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pandas as pd

from monitor.detection.chain import Chain
from monitor.detection.forming import Forming
from monitor.detection.labels import Trained, label, trained_until
from monitor.detection.series import SERIES, Series, Value, values_of
from monitor.detection.table import BROKEN, Kind, Notice
from monitor.record import Failure, Measurement
from monitor.transitions import Event, OnlineDetector, Transition, fit

# A confirmed transition is fitted to so many of the latest measurements of its series: the time
# that this takes must not grow with the run.
_FITTED_TO = 200

# The usual interval between measurements is the longest of so many of the latest: a checkpoint that
# is saved between two of them makes some shorter, and so does what was measured more often.
_INTERVALS = 4

# The table that says which weights were measured.
_CHAIN = "parameters"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C through, which DuckDB turns into an error like any other."""
    try:
        yield
    except RuntimeError as error:
        if str(error) == "Query interrupted":
            raise KeyboardInterrupt from error
        raise


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
        self._forming, self._chain = Forming(), Chain()
        self._measurements, self._last, self._why = 0, -1, ""
        # From one measurement to the next, where that did not come sooner for what is provisional.
        self._intervals: list[int] = []
        self._trained: list[Trained] = []
        self._connection = duckdb.connect(config={"threads": 1})

    @property
    def _looked_at(self) -> set[str]:
        """The names of the tables that are looked at as they are."""
        return {*self._forming.tables, _CHAIN}

    @property
    def pending(self) -> Mapping[str, float]:
        """By series, the step since which a transition of it has been provisional."""
        return dict(self._pending)

    @_interruptible()
    def replay(self, connection: duckdb.DuckDBPyConnection, *, until: int) -> None:
        """Takes what the tables of a connection say of a run up to a step, as if it was measured
        now; nothing is said of it.
        """
        self._trained = [one for one in trained_until(connection) if one.step <= until]
        by_step: dict[int, list[Value]] = {}
        for each in self._series:
            for step, values in values_of(each, connection)[0].items():
                by_step.setdefault(step, []).extend(values)
        tables = {
            name: _frame(connection, name, until)
            for name in sorted(self._looked_at & _views(connection))
        }
        steps = {*by_step} | {int(step) for table in tables.values() for step in table["step"]}
        for step in sorted(steps):
            if step <= until:
                at = {name: table[table["step"] == step] for name, table in tables.items()}
                self._take(step, by_step.get(step, []), {n: t for n, t in at.items() if len(t)})

    @_interruptible()
    def notice(self, measurement: Measurement) -> Noticed:
        """Takes a measurement, and says what is new; nothing at a step that it has passed."""
        step, failures = measurement.moment.step, []
        if step <= self._last:
            return Noticed()
        names = [reading.spec.name for reading in measurement.readings]
        for each in measurement.readings:
            self._connection.register(each.spec.name, each.table)
        try:
            values = []
            for series in self._series:
                by_step, error = values_of(series, self._connection)
                values += by_step.get(step, [])
                failures += [] if error is None else [Failure.of(f"series {series.name}", error)]
            self._trained += trained_until(self._connection)
        finally:
            for name in names:
                self._connection.unregister(name)
        since = dict(self._pending)
        tables = {
            reading.spec.name: reading.table.to_pandas()
            for reading in measurement.readings
            if reading.spec.name in self._looked_at
        }
        events = self._take(step, values, tables)
        notices = tuple(self._notice(event, since) for event in events)
        return Noticed(notices=notices, failures=tuple(failures))

    def _take(
        self, step: int, values: Sequence[Value], tables: Mapping[str, pd.DataFrame]
    ) -> list[Event]:
        if self._measurements and not self._pending:
            self._intervals = [*self._intervals, step - self._last][-_INTERVALS:]
        self._measurements, self._last = self._measurements + 1, step
        events = self._broken(step, tables)
        for value in values:
            history = self._histories.setdefault(value.series, _History())
            history.step.append(step)
            history.value.append(value.value)
        events += self._detector.update(
            step,
            {value.series: value.value for value in values},
            least={value.series: value.least for value in values},
        )
        interval = max(self._intervals, default=0)
        events += self._forming.take(step, tables, interval=interval)
        for event in events:
            if event.state == "provisional":
                self._pending[event.series] = event.step
            else:
                self._pending.pop(event.series, None)
        return events

    def _broken(self, step: int, tables: Mapping[str, pd.DataFrame]) -> list[Event]:
        """What is said where the weights do not come from those before: what was provisional is
        retracted, and no change goes on across it.
        """
        self._why = ""
        rows = tables.get(_CHAIN)
        if rows is None or not {"digest", "sketch"} <= {*rows.columns}:
            return []
        row = rows.iloc[-1]
        if not isinstance(row["digest"], str):
            return []
        known = self._chain.take(step, row["digest"], np.asarray(row["sketch"], dtype=float))
        if not known:
            return []
        self._why, before = "; ".join(one.why for one in known), len(self._detector.history)
        self._detector.break_chain(step)
        for history in self._histories.values():
            history.step.clear()
            history.value.clear()
        broken = Event(
            series=BROKEN,
            state="confirmed",
            direction="up",
            step=step,
            onset=min(one.since for one in known),
            score=1.0,
            threshold=1.0,
        )
        return [broken, *self._detector.history[before:]]

    def _kind(self, series: str) -> Kind:
        if series == BROKEN:
            return "break"
        return "change" if series in self._histories else "formation"

    def _notice(self, event: Event, since: Mapping[str, float]) -> Notice:
        history = self._histories.get(event.series)
        return Notice(
            event=event,
            detected_at=since.get(event.series, event.step),
            kind=self._kind(event.series),
            fitted=_fitted(event, history) if history and event.state == "confirmed" else None,
            n=len(history.step) if history else self._measurements,
            searched=len(self._histories),
            false_alarms=self._false_alarms,
            label=self._why or label(self._trained, onset=event.onset, until=event.step),
        )


def _fitted(event: Event, history: _History) -> Transition | None:
    """The transition that an event is about, where the series shows it clearly by now."""
    found = fit(history.step[-_FITTED_TO:], history.value[-_FITTED_TO:])
    alike = [one for one in found if one.direction == event.direction]
    return min(alike, key=lambda one: abs(one.onset - event.onset), default=None)


def _views(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """The names of what a connection can be asked for."""
    names = connection.execute("select table_name from information_schema.tables").fetchall()
    return {name for (name,) in names}


def _frame(connection: duckdb.DuckDBPyConnection, name: str, until: int) -> pd.DataFrame:
    """A table up to a step, without its times: DuckDB gives times with zones only where another
    package is installed.
    """
    described = connection.execute(f'select * from "{name}" limit 0').description  # noqa: S608
    columns = [column[0] for column in described if column[0] != "time"]
    chosen = ", ".join(f'"{column}"' for column in columns)
    rows = connection.execute(f'select {chosen} from "{name}" where step <= {until}')  # noqa: S608
    return pd.DataFrame(rows.fetchall(), columns=columns)
