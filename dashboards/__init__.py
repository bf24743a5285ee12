"""What shows the metrics: the configuration of a Prometheus server that scrapes a training run."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PROMETHEUS_CONFIG"]

PROMETHEUS_CONFIG = Path(__file__).with_name("prometheus.yml")
