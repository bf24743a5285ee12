"""What is on the dashboards that are shipped, and what they ask."""

from __future__ import annotations

import itertools
import json
import re

from dashboards import build

BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(build.FOLDER.glob("*.json"))}

# What is chosen of the variables.
CHOSEN = {
    "run": "r",
    "other": "s",
    "runs": "r|s",
    "attempt": "1",
    "layer": ".*",
    "one": "0",
    "band": "1.96",
    "__range": "600s",
}


def shown(board: dict) -> list[dict]:
    """The panels of a dashboard, those in closed rows too."""
    every = [[panel, *panel.get("panels", ())] for panel in board["panels"]]
    return [panel for panel in itertools.chain(*every) if panel["type"] != "row"]


PANELS = [(name, panel) for name, board in BOARDS.items() for panel in shown(board)]


def chosen(text: str) -> str:
    """As Grafana asks it, with what was chosen in place of variables."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: CHOSEN[found[1]], text)


def targets(board: dict, kind: str) -> list[tuple[str, dict]]:
    """The queries of panels and annotations, with where each is: of Prometheus, which have an
    `expr`, or of the service, which have a `url`.
    """
    asked = [(panel["title"], target) for panel in shown(board) for target in panel["targets"]]
    asked += [(mark["name"], mark["target"]) for mark in board["annotations"]["list"]]
    return [(at, target) for at, target in asked if kind in target]


def metrics(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    words = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"[\w:]*phasewatch_[\w:]+|[\w:]+(?=\{)", words))
