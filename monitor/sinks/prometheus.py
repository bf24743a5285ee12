"""The latest measurement as Prometheus metrics, served on loopback.

Every head is in Parquet; here a series budget holds: where a table has more rows than fit, the rows
that were ever best in some field stay, and every layer is summed up. A measurement pays for that
choice alone: its text is rendered by the first scrape, on the server's thread, and then only sent.
"""

from __future__ import annotations

import errno
import html
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pyarrow.compute as pc
import uvicorn
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from monitor.record import Measurement, Reading
from monitor.sinks.exposition import Page, TableRows, scalar_fields
from monitor.sinks.staying import Best, lasting

_log = logging.getLogger("phasewatch")

_PORTS_TRIED = 100


class PrometheusSink:
    """Serves the latest values of one run at `http://<address>:<port>/metrics`.

    Where `port` is taken the next free one is used (0: any free one); `url` says which. `info` goes
    into the labels of `phasewatch_run_info`. A table's rows take at most `budget` series; what does
    not fit is counted in `phasewatch_series_dropped_total`. Raises `OSError` where nothing can
    listen on `address`.
    """

    def __init__(
        self,
        run: str,
        *,
        address: str = "127.0.0.1",
        port: int = 9464,
        info: Mapping[str, str] | None = None,
        budget: int = 2_000,
    ) -> None:
        self._run = run
        self._info = {"run": run, **(info or {})}
        self._budget = budget
        self._best: dict[str, Best] = {}
        self._lasting: dict[str, Reading] = {}
        self._failures: Counter[str] = Counter()
        self._dropped = 0
        self._step = "-"
        self._page = Page(run, (), self._about_run())
        bound = bound_socket(address, port)
        host, number = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{number}"
        routes = [Route("/", self._landing_page), Route("/metrics", self._metrics_page)]
        settings = uvicorn.Config(
            Starlette(routes=routes), lifespan="off", log_config=None, access_log=False
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, args=([bound],), name="phasewatch-metrics", daemon=True
        )
        self._thread.start()

    def write(self, measurement: Measurement) -> None:
        """Replaces what is served by this measurement."""
        self._failures.update(failure.part for failure in measurement.failures)
        self._step = str(measurement.moment.step)
        try:
            held = [self._lasting_with(r) for r in measurement.readings if r.spec.lasting]
            self._lasting |= {reading.spec.name: reading for reading in held}
            of_now = [reading for reading in measurement.readings if not reading.spec.lasting]
            tables = [self._rows(reading) for reading in (*of_now, *self._lasting.values())]
        except Exception:
            # Nobody else can count this one.
            self._failures[type(self).__name__] += 1
            raise
        self._page = Page(self._run, tables, (*self._about(measurement), *self._about_run()))

    def close(self) -> None:
        """Stops listening."""
        self._server.should_exit = True
        self._thread.join(timeout=5)

    async def _metrics_page(self, request: Request) -> Response:
        text, content_type = self._page.text(request.headers.get("Accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def _landing_page(self, _request: Request) -> Response:
        run, step = html.escape(self._info["run"]), html.escape(self._step)
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>phasewatch</title>'
            f"<h1>phasewatch</h1><p>Run <b>{run}</b>, last measured at step <b>{step}</b>.</p>"
            '<p><a href="/metrics">Metrics</a></p></html>'
        )

    def _lasting_with(self, new: Reading) -> Reading:
        """A reading of what lasts, with those rows of earlier ones that it does not replace."""
        old = self._lasting.get(new.spec.name)
        return replace(new, table=lasting(new.spec, old.table if old else None, new.table))

    def _rows(self, reading: Reading) -> TableRows:
        """One table's rows, as far as they fit."""
        spec, table = reading.spec, reading.table
        valid = table.filter(pc.equal(table["validity"], "ok"))
        columns = sum(len(field.columns) for field in scalar_fields(spec))
        best = self._best.setdefault(spec.name, Best())
        shown = best.fitting(spec, valid, self._budget // max(1, columns))
        self._dropped += (len(valid) - len(shown)) * columns
        return TableRows(spec=spec, valid=valid, shown=shown, invalid=len(table) - len(valid))

    def _about_run(self) -> Iterator[Metric]:
        yield InfoMetricFamily("phasewatch_run", "The run that is measured.", value=self._info)
        failures = CounterMetricFamily(
            "phasewatch_failures", "Probes and sinks that raised.", labels=["run", "part"]
        )
        for part, count in self._failures.items():
            failures.add_metric([self._run, part], count)
        yield failures
        dropped = CounterMetricFamily(
            "phasewatch_series_dropped",
            "Series left out of this page for the series budget, summed over measurements.",
            labels=["run"],
        )
        dropped.add_metric([self._run], self._dropped)
        yield dropped

    def _about(self, measurement: Measurement) -> Iterator[Metric]:
        moment = measurement.moment
        for name, help_text, value in (
            ("step", "Training step of the latest measurement.", moment.step),
            ("tokens", "Training tokens seen at the latest measurement.", moment.tokens),
            (
                "last_measurement_timestamp_seconds",
                "When the latest measurement was made.",
                moment.time.timestamp(),
            ),
        ):
            gauge = GaugeMetricFamily(f"phasewatch_{name}", help_text, labels=["run"])
            if value is not None:
                gauge.add_metric([self._run], value)
            yield gauge
        durations = GaugeMetricFamily(
            "phasewatch_probe_duration_seconds",
            "What each probe of the latest measurement cost, forward passes included.",
            labels=["run", "probe"],
        )
        for probe, seconds in measurement.seconds.items():
            durations.add_metric([self._run, probe], seconds)
        yield durations


def check_port(port: int | None) -> None:
    """Raises `ValueError` where `port` is no port (0: any free one, None: none at all)."""
    if port is not None and (type(port) is not int or not 0 <= port <= 65_535):
        raise ValueError(f"metrics_port={port!r}: expected 0 to 65535, or None for no metrics")


def bound_socket(address: str, port: int, what: str = "metrics") -> socket.socket:
    """A socket that listens on `port`, or on the next free one where it is taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    candidates = range(port, min(port + _PORTS_TRIED, 65_536)) if port else [0]
    for candidate in candidates:
        try:
            bound = socket.create_server((address, candidate), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        if candidate != port:
            _log.warning("port %d is taken: %s are served at port %d", port, what, candidate)
        return bound
    raise OSError(errno.EADDRINUSE, f"ports {port} to {candidates[-1]} are all taken")
