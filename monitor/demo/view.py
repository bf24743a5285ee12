"""The demo's live view: how far training is, and what the heads do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from monitor.record import Measurement
from monitor.terminal.saying import Number, called, numbers_table, said

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
        self._numbers: list[Number] = []
        self._said: list[str] = []
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_interactive:
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
        self._numbers = [
            self._head("best induction head", heads, "prefix_matching"),
            self._head("best previous-token head", heads, "previous_token"),
            self._number("in-context score (paired), nats", in_context, "paired_score"),
            self._number("loss late in held-out text, nats", in_context, "loss_late"),
            *self._concepts(followed(measurement.frame("concepts"))),
        ]
        new = [*_transitions(measurement)]
        self._said += new
        if not self._console.is_interactive:
            shown = "   ".join(map(str, self._numbers[:3]))
            self._console.print(f"step {measurement.moment.step:5d}   {shown}", soft_wrap=True)
            for line in new:
                self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Stops the live view where it stands."""
        self._live.stop()

    def _head(self, name: str, heads: pd.DataFrame, field: str) -> Number:
        best = heads.sort_values(field).iloc[-1]
        return self._number(f"{name} {best['layer']}.{best['head']}", best, field)

    def _concepts(self, rows: pd.DataFrame) -> Iterator[Number]:
        for _, row in rows[rows["validity"] == "ok"].iterrows():
            if row["concept"] in CONCEPTS:
                yield self._number(f"concept: {called(row['concept'])} (AUC)", row, "auc")

    def _number(self, name: str, row: pd.Series, field: str) -> Number:
        # The best head may be another one, and the number is the same.
        history = self._history.setdefault(name if field == "auc" else field, [])
        history.append(float(row[field]))
        return Number.of(name, row, field, history)

    def _panel(self) -> Panel:
        table = numbers_table(self._numbers, _HISTORY)
        said_last = [Text(line, "yellow") for line in self._said[-_SAID:]]
        where = Text(f"{self._metrics}{self._tables}   Ctrl-C stops and keeps the run", "dim")
        shown = Group(self._progress, Text(), table, Text(), *said_last, where)
        return Panel(shown, title=self._title)


def _transitions(measurement: Measurement) -> Iterator[str]:
    for reading in measurement.readings:
        if reading.spec.name == "transitions":
            for row in reading.table.to_pylist():
                yield f"step {row['step']:5d}   {said(row)}"


def followed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layer and the method that are shown."""
    shown: pd.DataFrame = rows[(rows["layer"] == LAYER) & (rows["method"] == _METHOD)]
    return shown
