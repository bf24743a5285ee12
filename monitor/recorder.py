"""Where the measurements of a run go, and what becomes of what fails."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from monitor.record import Failure, Measurement
from monitor.sinks import ParquetSink, PrometheusSink, Sink
from monitor.sinks.target import Target

_log = logging.getLogger("phasewatch")


class Recorder:
    """Hands measurements to sinks. What fails is said once, counted and recorded, and the rest goes
    on: none of it raises.

    `store` (None: there is none) is the first sink from `begin` on: what another one has shown
    should be found on disk.
    """

    def __init__(self, store: ParquetSink | None, sinks: Sequence[Sink]) -> None:
        self._store, self._sinks = store, list(sinks)
        self._target: Target | None = None
        self._said: set[str] = set()

    @property
    def url(self) -> str | None:
        """Where the metrics are served, or None."""
        return next((s.url for s in self._sinks if isinstance(s, PrometheusSink)), None)

    def begin(self, run: str, *, address: str, port: int | None, info: Mapping[str, str]) -> None:
        """Opens the store, and serves metrics, which are to be found beside it, unless `port` is
        None.
        """
        if self._store is not None:
            self._sinks.insert(0, self._store)
        if port is None:
            return
        try:
            serving = PrometheusSink(run, address=address, port=port, info=info)
        except OSError as error:
            _log.warning("no metrics are served: nothing can listen on %s (%s)", address, error)
            return
        self._sinks.append(serving)
        if self._store is not None:
            try:
                self._target = Target(self._store.root, run, serving.url)
            except OSError as error:
                _log.warning("Prometheus cannot find %s by itself: %s", serving.url, error)

    def record(
        self, measurement: Measurement, then: Callable[[], Sequence[Failure]]
    ) -> Measurement:
        """The measurement with what failed in recording it, and in what was to be done `then`."""
        before = measurement.failures
        for sink in self._sinks:
            try:
                sink.write(measurement)
            except Exception as error:
                measurement = measurement.with_failure(Failure.of(type(sink).__name__, error))
        for failure in then():
            measurement = measurement.with_failure(failure)
        if measurement.failures != before and self._store is not None:
            # What failed itself is on its list of what waits to be written.
            with contextlib.suppress(Exception):
                self._store.write(replace(measurement, readings=()))
        self._say_once(measurement.failures)
        return measurement

    def close(self) -> None:
        """Writes what still waits to be written, and stops serving."""
        # Nobody is to be sent to where nothing is served any more.
        for part in (self._target, *self._sinks):
            try:
                if part is not None:
                    part.close()
            except Exception as error:
                _log.warning("%s could not be closed: %s", type(part).__name__, error)

    def _say_once(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            if failure.part not in self._said:
                self._said.add(failure.part)
                _log.warning(
                    "%s failed, training goes on (said once; every failure is counted and "
                    "recorded): %s\n%s",
                    failure.part,
                    failure.error,
                    failure.traceback,
                )
