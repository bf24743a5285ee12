"""What shows the metrics: Prometheus that finds and scrapes training runs, rules for what to record
and to be told of, Alertmanager that passes it on, and dashboards of Grafana.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["ALERTMANAGER_CONFIG", "GRAFANA", "PROMETHEUS_CONFIG", "RULES"]

ALERTMANAGER_CONFIG = Path(__file__).with_name("alertmanager.yml")
PROMETHEUS_CONFIG = Path(__file__).with_name("prometheus.yml")
RULES = tuple(sorted(Path(__file__).with_name("rules").glob("*.yml")))
GRAFANA = tuple(sorted(Path(__file__).with_name("grafana").glob("*.json")))
