"""Reads back what a monitor left of a run: its tables, its metrics page, and what it said."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import prometheus_client.parser

import monitor


def steps(root: str | Path, table: str = "in_context", *, run: str | None = None) -> list[int]:
    return monitor.read(root, table, run=run)["step"].tolist()


def tokens(root: str | Path) -> list[float]:
    return monitor.read(root, "in_context")["tokens"].tolist()


def attempt(root: str | Path) -> dict[str, Any]:
    """The last attempt, with its configuration unpacked."""
    row = monitor.read(root, "attempts").iloc[-1].to_dict()
    return row | {"config": json.loads(row["config"])}


def stimulus(root: str | Path, name: str) -> list[list[int]]:
    """The token ids of one of the stored stimuli."""
    stored = monitor.read(root, "stimuli")
    return stored[stored["stimulus"] == name]["token_ids"].map(list).tolist()


def get(url: str, accept: str = "") -> tuple[str, str]:
    """The body and the content type of a page."""
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
        return answer.read().decode(), answer.headers["Content-Type"]


def page(url: str) -> str:
    """The text of a metrics page."""
    return get(f"{url}/metrics")[0]


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Values on a metrics page, by name and labels other than the run."""
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "run")): sample.value
        for family in prometheus_client.parser.text_string_to_metric_families(page(url))
        for sample in family.samples
    }


def said(caplog: Any) -> list[str]:
    """What was logged under the name of phasewatch."""
    return [record.getMessage() for record in caplog.records if record.name == "phasewatch"]
