"""Runs for a service to serve, and what it answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from monitor.service import Service
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import measurement
from tests.recorded import get


def record(root: Path, *steps: int, run: str = "r", attempt: int = 1) -> None:
    """Some steps of a run, in the tables `heads` and `losses`."""
    sink = ParquetSink(root, run)
    for step in steps:
        sink.write(measurement(step, run=run, attempt=attempt))
    sink.close()


def ask(service: Service, path: str, **query: Any) -> Any:
    """An answer in JSON."""
    return json.loads(text(service, path, **query))


def text(service: Service, path: str, **query: Any) -> str:
    asked = urllib.parse.urlencode(query, doseq=True)
    return get(f"{service.url}{path}" + (f"?{asked}" if asked else ""))[0]


def refused(service: Service, path: str, **query: Any) -> tuple[int, dict[str, str]]:
    """The status and the error of what is not answered."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        text(service, path, **query)
    told = json.loads(caught.value.read())
    assert set(told) == {"error", "expected", "do"}
    return caught.value.code, told
