"""Where measurements go."""

from __future__ import annotations

from typing import Protocol

from monitor.record import Measurement
from monitor.sinks.grafana import GrafanaSink
from monitor.sinks.memory import MemorySink
from monitor.sinks.parquet import SUPERSEDED, ParquetSink, check_root
from monitor.sinks.prometheus import PrometheusSink, check_port

__all__ = [
    "SUPERSEDED",
    "GrafanaSink",
    "MemorySink",
    "ParquetSink",
    "PrometheusSink",
    "Sink",
    "check_port",
    "check_root",
]


class Sink(Protocol):
    """Takes every measurement as it is made."""

    def write(self, measurement: Measurement) -> None:
        """Takes one measurement; may raise, and then the caller goes on without it."""

    def close(self) -> None:
        """Lets go of files, threads and ports."""
