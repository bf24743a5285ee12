"""The demo's live view: how far training is, and what the heads do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from scipy.stats import t as student_t

from monitor.record import Measurement

_BLOCKS = "▁▂▃▄▅▆▇█"
_HISTORY = 32

# What was said of transitions, the latest.
_SAID = 4

# The concepts that are shown, after which block, and by which method their directions are found.
CONCEPTS = ("comment", "function_name", "argument")
LAYER = 0
_METHOD = "diff_in_means"


class TerminalView:
    """A sink that shows the latest measurement in a terminal, and prints lines where there is none.

    To be used as a context manager around the training. Counts the `measurements`, and the
    `seconds` that they took.
    """

    def __init__(self, console: Console, *, run: str, steps: int, root: Path) -> None:
        self._console = console
        self._title = f"phasewatch demo · {run}"
        self._tables = f"tables {root}/"
        self._metrics = ""
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("training", total=steps, loss="-")
        self.measurements = 0
        self.seconds = 0.0
        self._history: dict[str, list[float]] = {}
        self._rows: list[tuple[str, str, str, str]] = []
        self._said: list[str] = []
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def advance(self, step: int, loss: float, url: str | None) -> None:
        """Shows that training came to `step` with this loss, and serves its metrics at `url`."""
        self._metrics = f"metrics {url}/metrics   " if url else ""
        self._progress.update(self._task, completed=step, loss=f"{loss:.2f}")

    def write(self, measurement: Measurement) -> None:
        """Takes a measurement for the next refresh of the view."""
        self.measurements += 1
        self.seconds += sum(measurement.seconds.values())
        heads = measurement.frame("induction")
        in_context = measurement.frame("in_context").iloc[0]
        self._rows = [
            self._head("best induction head", heads, "prefix_matching"),
            self._head("best previous-token head", heads, "previous_token"),
            self._value("in-context score (paired), nats", in_context, "paired_score"),
            self._value("loss late in held-out text, nats", in_context, "loss_late"),
            *self._concepts(followed(measurement.frame("concepts"))),
        ]
        said = [*_transitions(measurement)]
        self._said += said
        if not self._console.is_terminal:
            shown = "   ".join(f"{name} {value}" for name, value, _, _ in self._rows[:3])
            self._console.print(f"step {measurement.moment.step:5d}   {shown}", soft_wrap=True)
            for line in said:
                self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Stops the live view where it stands."""
        self._live.stop()

    def _head(self, name: str, heads: pd.DataFrame, field: str) -> tuple[str, str, str, str]:
        best = heads.sort_values(field).iloc[-1]
        name, value, null, line = self._value(name, best, field)
        return f"{name} {best['layer']}.{best['head']}", value, null, line

    def _concepts(self, rows: pd.DataFrame) -> Iterator[tuple[str, str, str, str]]:
        for _, row in rows[rows["validity"] == "ok"].iterrows():
            if row["concept"] in CONCEPTS:
                yield self._value(f"concept: {called(row['concept'])} (AUC)", row, "auc")

    def _value(self, name: str, row: pd.Series, field: str) -> tuple[str, str, str, str]:
        history = self._history.setdefault(name if field == "auc" else field, [])
        history.append(float(row[field]))
        value = f"{row[field]:+.2f}" if row[field] < 0 else f"{row[field]:.2f}"
        value += f" ± {half_width(row, field):.2f}"
        return name, value, f"{row[f'{field}_null']:.2f}", sparkline(history, _HISTORY)

    def _panel(self) -> Panel:
        table = Table(box=None, expand=True, padding=(0, 1))
        table.add_column("")
        table.add_column("now ± 95%", justify="right", no_wrap=True)
        table.add_column("null", justify="right", no_wrap=True)
        table.add_column("since the start", width=_HISTORY, no_wrap=True)
        for name, value, null, line in self._rows:
            table.add_row(name, Text(value, "bold"), Text(null, "dim"), Text(line, "cyan"))
        said = [Text(line, "yellow") for line in self._said[-_SAID:]]
        where = Text(f"{self._metrics}{self._tables}   Ctrl-C stops and keeps the run", "dim")
        shown = Group(self._progress, Text(), table, Text(), *said, where)
        return Panel(shown, title=self._title)


def _transitions(measurement: Measurement) -> Iterator[str]:
    for reading in measurement.readings:
        if reading.spec.name == "transitions":
            for row in reading.table.to_pylist():
                way = f" {row['direction']}" if row["kind"] == "change" else ""
                since = f"since step {row['began']:.0f}"
                yield f"step {row['step']:5d}   {row['series']}{way} {since}: {row['state']}"


def followed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layer and the method that are shown."""
    shown: pd.DataFrame = rows[(rows["layer"] == LAYER) & (rows["method"] == _METHOD)]
    return shown


def called(concept: str) -> str:
    """A concept's name in a sentence."""
    return concept.replace("_", " ")


def half_width(row: pd.Series, field: str) -> float:
    """Half of the 95% confidence interval of a field, from Student's t over `n` sequences."""
    return float(student_t.ppf(0.975, int(row["n"]) - 1) * row[f"{field}_stderr"])


def sparkline(values: list[float], width: int) -> str:
    """The values from the first to the last in at most `width` characters, the highest as a full
    block.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)
    '▁▂▃▄▅▆▇█'
    """
    at = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    shown = np.asarray(values, dtype=float)[at]
    if not np.isfinite(shown).any():
        return ""
    low, high = np.nanmin(shown), np.nanmax(shown)
    levels = np.nan_to_num((shown - low) / ((high - low) or 1) * (len(_BLOCKS) - 1))
    return "".join(_BLOCKS[int(level)] for level in levels.round())
