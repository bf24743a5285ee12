"""One run in a terminal, in as many rows as there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from monitor.across.printed import count
from monitor.terminal.drawing import head_map, plot
from monitor.terminal.essentials import Essentials
from monitor.terminal.saying import numbers_table, plain

# Rows of the plot: as few as say anything, and as many as are pleasant; and of transitions.
_LEAST_PLOT, _MOST_PLOT = 4, 14
_LEAST_SAID, _MOST_SAID = 2, 12

_WIDEST = 140
# Less than that is no more than noise, and is to look so.
_SPAN = 0.1
_FOOT = "Ctrl-C ends the watching, not the run · ±: 95% intervals"
_TITLE = "bold"
_STATES = {"running": "bold green", "finished": "bold cyan", "stalled": "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What is shown: the `seen` of a run, or None while there is none to see.

    On a `screen` it takes as many rows as that has, else as many as it needs. `waiting` says why
    there is nothing to see, `others` are the other runs, as the service tells them, `note` is the
    last that went wrong, and `now` is when this was so, in seconds of the epoch.
    """

    root: str
    seen: Essentials | None
    others: Sequence[Mapping[str, Any]] = ()
    now: float
    note: str = ""
    waiting: str = ""
    screen: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _WIDEST)
        colour = console.color_system is not None and not console.no_color
        rows = console.height if self.screen else None
        for part in self._parts(width, rows, colour=colour):
            # On a screen each line takes one row, and what is too long for it ends in an ellipsis.
            if isinstance(part, Text) and rows is not None:
                part.truncate(width, overflow="ellipsis")
            yield part

    def _parts(self, width: int, rows: int | None, *, colour: bool) -> list[RenderableType]:
        head: list[RenderableType] = []
        foot: list[RenderableType] = [Text(plain(f"note: {self.note}"), "red")] if self.note else []
        foot += [Text(_FOOT, "dim")] if self.screen else []
        if self.seen is None:
            title = Text(f"phasewatch watch · {plain(self.root)}", _TITLE)
            return [title, Text("waiting …", "dim"), Text(plain(self.waiting)), *foot]
        seen = self.seen
        # What was said of each transition last: that it was provisional before need not be seen.
        last = list({one.of: one for one in reversed(seen.said)}.values())
        last.sort(key=lambda one: one.step, reverse=True)
        head += [_title(seen, plain(self.root)), _where(seen, self.now)]
        head += [_others(self.others)] if self.others else []
        numbers = numbers_table(seen.numbers, max(8, min(64, width - 56)))
        told = [
            _named("concepts", seen.concepts or "not measured"),
            _named("circuit", seen.circuit or "not measured"),
            *(_named("not interpretable", one) for one in seen.unclear),
        ]
        if rows is not None:
            # One row each for the headings of the table, the plot and transitions, and the axis.
            taken = len(head) + len(seen.numbers) + 1 + 2 + 1 + len(foot)
            room = rows - taken
            told = _cropped(told, max(2, room - _LEAST_PLOT - _LEAST_SAID))
            room -= len(told)
            said = max(_LEAST_SAID, min(len(last), _MOST_SAID, room - _LEAST_PLOT, room // 2))
            height = min(_MOST_PLOT, room - min(said, max(1, len(last))))
        else:
            said, height = len(last), _MOST_PLOT
        return [
            *head,
            numbers,
            *([_figures(seen, width, height, colour=colour)] if height >= _LEAST_PLOT else []),
            Text("transitions, and when that was said", _TITLE),
            *(Text(f"  {one}", _style(one.text)) for one in last[:said]),
            *([] if last else [Text("  none yet", "dim")]),
            *told,
            *foot,
        ]


def _title(seen: Essentials, root: str) -> Text:
    text = Text(plain(seen.about["run"]), _TITLE)
    state = seen.about["state"]
    return text.append(f"  {state}", _STATES.get(state, "")).append(f"  in {root}", "dim")


def _where(seen: Essentials, now: float) -> Text:
    about = seen.about
    parts = [] if about["last_step"] is None else [f"step {about['last_step']:,}"]
    parts += [] if about["tokens"] is None else [f"{count(about['tokens'])} tokens"]
    times = about["measurements"]
    parts += [f"{times:,} measurement{'' if times == 1 else 's'}"]
    if about["time"] is not None:
        ago = now - datetime.fromisoformat(about["time"]).timestamp()
        parts.append(f"last {duration(ago)} ago")
    if seen.elapsed > 0:
        parts.append(f"cost {seen.measured / seen.elapsed:.1%}")
    return Text(" · ".join(parts))


def duration(seconds: float) -> str:
    """A time that has passed, in whole units, down to the largest of which there are two.

    >>> [duration(seconds) for seconds in (-1, 12.6, 125, 7_260, 200_000)]
    ['0 s', '13 s', '2 min', '2 h', '2 d']
    """
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def _others(others: Sequence[Mapping[str, Any]]) -> Text:
    told = [f"{plain(one['run'])} ({one['state']})" for one in others]
    return _named(f"{len(told)} more", ", ".join(told))


def _named(name: str, text: str) -> Text:
    return Text.assemble((f"{name}: ", _TITLE), text)


def _style(line: str) -> str:
    return next((s for word, s in _SAID.items() if word in line), "")


_SAID = {": provisional": "yellow", ": confirmed": "green", ": retracted": "dim"}


def _cropped(lines: list[Text], most: int) -> list[Text]:
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], Text(f"and {len(lines) - most + 1} more lines: --once", "dim")]


def _figures(seen: Essentials, width: int, height: int, *, colour: bool) -> RenderableType:
    """The best heads over time, and beside them the map of all heads now."""
    if seen.heads is None:
        return Text("heads: not measured", "dim")
    null = seen.null.y[-1] if seen.null is not None and seen.null.y else 0.0
    layers, heads = seen.heads.shape
    across = max(24, min(2 * heads + 5, width // 2 - 2))
    left = width - across - 2
    rows, ends = plot(seen.best, seen.null, width=left, height=height, span=_SPAN)
    curves = [Text("induction (prefix matching) of the best heads", _TITLE), *rows]
    if ends is None:
        curves.append(Text("nothing to draw: no head can be interpreted", "dim"))
    else:
        curves.append(_axis(seen.axis, ends, rows[0].cell_len, len(f"{seen.best[0].y[-1]:.2f} ")))
    mapped = head_map(seen.heads, null, width=across, height=height - 1, colour=colour)
    scale = "tenths" if 2 * heads <= across - 3 and layers <= height - 1 else "light is high"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=left, no_wrap=True)
    grid.add_column(width=across, no_wrap=True)
    heading = [Text("layer × head, now", _TITLE), Text(f"({scale}; null {null:.2f})", "dim")]
    grid.add_row(Group(*curves), Group(*heading, *mapped))
    return grid


def _axis(axis: str, ends: tuple[float, float], width: int, margin: int) -> Text:
    if axis == "time":
        first, last = (f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}" for at in ends)
        last += " UTC"
    else:
        first, last = (f"{at:,.0f}" for at in ends)
        last = f"{axis} {last}"
    room = max(0, width - margin - len(first) - len(last) - 5)
    return Text(f"{'':{margin}}{first}{'':{room}}{last}", "dim")
