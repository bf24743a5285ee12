"""What is done about transitions while a run is measured: they are noticed, weights from around
them are kept, and who wants to know is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from monitor.detection import SERIES, SPEC, Notice, Noticing, Series, reading
from monitor.keeping import Keeper
from monitor.query import connect
from monitor.record import Failure, Measurement, Reading

_log = logging.getLogger("phasewatch")


class Acting:
    """Notices transitions of one run, on the process that has its measurements.

    Args:
        series: what is followed besides `SERIES`.
        false_alarms: provisional transitions to expect of 1,000 measurements of a run without any;
            None: nothing is followed.
        checkpoint_bytes: what weights may take on disk; 0: none are kept.
        on_transition: called with each notice, once it is recorded.

    Raises:
        TypeError, ValueError: an argument is of no use.
    """

    def __init__(
        self,
        *,
        series: Sequence[Series] = (),
        false_alarms: float | None = 1.0,
        checkpoint_bytes: int = 0,
        on_transition: Callable[[Notice], object] | None = None,
    ) -> None:
        for each in series:
            if not isinstance(each, Series):
                raise TypeError(f"series= needs a list of Series(...); got {type(each).__name__}")
        if on_transition is not None and not callable(on_transition):
            raise TypeError(
                f"on_transition= is {type(on_transition).__name__}; expected a function of a "
                "monitor.detection.Notice"
            )
        if type(checkpoint_bytes) is not int or checkpoint_bytes < 0:
            raise ValueError(
                f"checkpoint_bytes={checkpoint_bytes!r}; expected a whole number of bytes, 0 for "
                "no weights"
            )
        self._noticing = (
            None
            if false_alarms is None
            else Noticing([*SERIES, *series], false_alarms=false_alarms)
        )
        self._bytes, self._on_transition = checkpoint_bytes, on_transition
        self._keeper: Keeper | None = None
        self.notices: tuple[Notice, ...] = ()
        """Those of the latest measurement."""

    @property
    def pending(self) -> Mapping[str, float]:
        """By series, the step since which a transition of it has been provisional."""
        return {} if self._noticing is None else self._noticing.pending

    def begin(self, root: Path, run: str, *, after: int, goes_on: bool) -> None:
        """Takes up a run that is stored under `root`, as it was after step `after`. Never raises:
        what cannot be read is not known, and weights that cannot be kept are not.
        """
        try:
            if self._bytes and self._noticing is not None:
                self._keeper = Keeper(root, run, most_bytes=self._bytes)
                self._keeper.begin(after)
            if goes_on and self._noticing is not None:
                with contextlib.closing(connect(root, run=run)) as connection:
                    self._noticing.replay(connection, until=after)
        except Exception as error:
            _log.warning("transitions of run %s begin anew (%s)", run, error)

    def notice(self, model: nn.Module | None, measurement: Measurement) -> Measurement:
        """The measurement with the table of what was noticed in it, and with what failed; `model`
        is None where its weights are not to be kept.
        """
        self.notices = ()
        if self._noticing is None:
            return measurement
        begun = time.perf_counter()
        failures: list[Failure] = []
        new: list[Reading] = []
        try:
            noticed = self._noticing.notice(measurement)
            failures += noticed.failures
            self.notices = self._kept(model, measurement, noticed.notices, failures)
            if self.notices:
                new.append(reading(self.notices, measurement.moment))
        except Exception as error:
            failures.append(Failure.of(SPEC.name, error))
        taken: dict[str, Any] = {**measurement.seconds, SPEC.name: time.perf_counter() - begun}
        return dataclasses.replace(
            measurement,
            readings=(*measurement.readings, *new),
            failures=(*measurement.failures, *failures),
            seconds=taken,
        )

    def _kept(
        self,
        model: nn.Module | None,
        measurement: Measurement,
        notices: tuple[Notice, ...],
        failures: list[Failure],
    ) -> tuple[Notice, ...]:
        """The notices with what weights are kept for them; what fails in that joins `failures`."""
        if self._keeper is None or model is None:
            return notices
        try:
            return self._keeper.keep(model, measurement.moment.step, notices)
        except Exception as error:
            failures.append(Failure.of("checkpoints", error))
            return notices

    def tell(self) -> tuple[Failure, ...]:
        """Tells who wants to know of the latest notices, and returns what failed of that."""
        failures = []
        for notice in self.notices:
            _log.info("%s", notice)
            try:
                if self._on_transition is not None:
                    self._on_transition(notice)
            except Exception as error:
                failures.append(Failure.of("on_transition", error))
        return tuple(failures)
