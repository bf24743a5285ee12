"""The latest measurement as Prometheus metrics, served on loopback.

The text is rendered once per measurement and then only sent, however often it is asked for. Every
head is in Parquet; here a series budget holds: where a table has more rows than fit, the rows that
were ever best in some field stay, and every layer is summed up.
"""

from __future__ import annotations

import errno
import html
import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from monitor.record import Measurement, ProbeSpec, Reading

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
        self._best: dict[str, pd.DataFrame] = {}
        self._failures: Counter[str] = Counter()
        self._dropped = 0
        self._metrics: tuple[Metric, ...] = ()
        self._pages: dict[str, bytes] = {}
        self._step = "-"
        self._lock = threading.Lock()
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._publish(tuple(self._about_run()))
        bound = _bound_socket(address, port)
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
            rows = [metric for reading in measurement.readings for metric in self._rows(reading)]
        except Exception:
            # Nobody else can count this one.
            self._failures[type(self).__name__] += 1
            raise
        self._publish((*rows, *self._about(measurement), *self._about_run()))

    def close(self) -> None:
        """Stops listening."""
        self._server.should_exit = True
        self._thread.join(timeout=5)

    def collect(self) -> Iterator[Metric]:
        """The metrics as prometheus_client's registry wants them."""
        yield from self._metrics

    async def _metrics_page(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        with self._lock:
            if content_type not in self._pages:
                self._pages[content_type] = encode(self.registry)
            return Response(self._pages[content_type], headers={"Content-Type": content_type})

    async def _landing_page(self, _request: Request) -> Response:
        run, step = html.escape(self._info["run"]), html.escape(self._step)
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>phasewatch</title>'
            f"<h1>phasewatch</h1><p>Run <b>{run}</b>, last measured at step <b>{step}</b>.</p>"
            '<p><a href="/metrics">Metrics</a></p></html>'
        )

    def _publish(self, metrics: tuple[Metric, ...]) -> None:
        with self._lock:
            self._metrics = metrics
            self._pages.clear()

    def _rows(self, reading: Reading) -> Iterator[Metric]:
        """The metrics of one table: its rows as far as they fit, and every layer summed up."""
        spec = reading.spec
        frame = reading.table.to_pandas()
        valid = frame[frame["validity"] == "ok"]
        yield self._gauge(
            f"phasewatch_{spec.name}_not_interpretable",
            "Rows of the latest measurement whose validity is not ok; they are not exposed.",
            pd.Series([float(len(frame) - len(valid))]),
        )
        fields = [field for field in spec.fields if not field.per_position]
        columns = [column for field in fields for column in field.columns]
        kept = self._fitting(spec, valid, rows=self._budget // max(1, len(columns)))
        self._dropped += (len(valid) - len(kept)) * len(columns)
        layered = [dim.name for dim in spec.dims] == ["layer", "head"]
        for field in fields:
            help_of = {
                "": f"{field.help} {spec.source}.",
                "_stderr": f"Standard error of {field.name}.",
                "_null": f"What {field.name} would be without structure: {field.null}.",
            }
            for column in field.columns:
                help_text = help_of[column.removeprefix(field.name)]
                yield self._gauge(spec.metric(column), help_text, kept[column])
            if layered:
                by_layer = valid.groupby("layer")[field.name]
                for name, values in (("max", by_layer.max()), ("mean", by_layer.mean())):
                    help_text = f"{name.capitalize()} over the heads of a layer: {field.help}"
                    yield self._gauge(spec.metric(field.name, f"_layer_{name}"), help_text, values)

    def _fitting(self, spec: ProbeSpec, frame: pd.DataFrame, *, rows: int) -> pd.DataFrame:
        """At most `rows` rows, indexed by their dimensions.

        First come those that were ever the best in some field, then the second best: by what a row
        reached at any time, so that it does not come and go with the noise.
        """
        dims = [dim.name for dim in spec.dims]
        frame = frame.set_index(dims) if dims else frame
        if len(frame) <= rows:
            return frame
        values = frame[[field.name for field in spec.fields if not field.per_position]]
        best = self._best.get(spec.name, values)
        best = values.combine(best, np.fmax).reindex(values.index.union(best.index))
        self._best[spec.name] = best
        place = best.loc[values.index].rank(ascending=False, method="first").min(axis=1)
        return frame.loc[place.sort_values(kind="stable").index[:rows].sort_values()]

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
            yield self._gauge(f"phasewatch_{name}", help_text, pd.Series([value], dtype=float))
        yield self._gauge(
            "phasewatch_probe_duration_seconds",
            "What each probe of the latest measurement cost, forward passes included.",
            pd.Series(measurement.seconds, dtype=float).rename_axis("probe"),
        )

    def _gauge(self, name: str, help_text: str, values: pd.Series) -> GaugeMetricFamily:
        """A gauge with one series a value; named index levels become labels."""
        levels = [str(level) for level in values.index.names if level is not None]
        family = GaugeMetricFamily(name, help_text, labels=["run", *levels])
        for index, value in values.dropna().items():
            where = index if isinstance(index, tuple) else (index,)
            family.add_metric([self._run, *map(str, where if levels else ())], float(value))
        return family


def check_port(port: int | None) -> None:
    """Raises `ValueError` where `port` is no port (0: any free one, None: none at all)."""
    if port is not None and (type(port) is not int or not 0 <= port <= 65_535):
        raise ValueError(f"metrics_port={port!r}: expected 0 to 65535, or None for no metrics")


def _bound_socket(address: str, port: int) -> socket.socket:
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
            _log.warning("port %d is taken: metrics are served at port %d", port, candidate)
        return bound
    raise OSError(errno.EADDRINUSE, f"ports {port} to {candidates[-1]} are all taken")
