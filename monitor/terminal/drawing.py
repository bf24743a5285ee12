"""Drawings in characters: sparklines, plots and maps of heads, legible without colour as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_SHADES = " ░▒▓█"
_UNKNOWN = "?"

# The dots of a braille character, from the top, in its left and in its right column.
_BRAILLE, _DOTS = 0x2800, ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

# Told apart by people who see few colours as well, and by their names beside the plot.
_COLOURS = ("bright_cyan", "yellow", "magenta")

# From the null to 1: dark blue over green to yellow, each step brighter than the one before, for
# those who do not see the colours.
_RAMP = ((42, 20, 72), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_GREY = "rgb(90,90,90)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve with its name: its value `y` at each `x`, in order of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def sparkline(values: Sequence[float], width: int) -> str:
    """The values from the first to the last in at most `width` characters, the highest as a full
    block; those that are no numbers leave a gap.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8)
    '▁▂▃▄▅▆▇█'
    >>> sparkline([0, float("nan"), 7], 8)
    '▁ █'
    """
    at = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    shown = np.asarray(values, dtype=float)[at]
    finite = np.isfinite(shown)
    if not finite.any():
        return ""
    low, high = shown[finite].min(), shown[finite].max()
    levels = (shown - low) / ((high - low) or 1) * (len(_BLOCKS) - 1)
    return "".join(
        _BLOCKS[round(level)] if known else " "
        for level, known in zip(levels.tolist(), finite, strict=True)
    )


def along(line: Line, width: int) -> list[float]:
    """The line's value at `width` places equally far apart, each that of the last x until there; a
    single value where it has a single x.

    >>> along(Line(name="", x=[0, 1, 2, 4, 8], y=[0.0, 1.0, 2.0, 3.0, 4.0]), 5)
    [0.0, 2.0, 3.0, 3.0, 4.0]
    """
    if not len(line.x) or line.x[0] == line.x[-1]:
        return list(line.y[-1:])
    places = np.linspace(line.x[0], line.x[-1], width)
    last = np.searchsorted(np.asarray(line.x, dtype=float), places, side="right") - 1
    return [float(line.y[at]) for at in last.clip(0)]


def plot(
    lines: Sequence[Line], null: Line | None, *, width: int, height: int, span: float = 0.0
) -> tuple[list[Text], tuple[float, float] | None]:
    """Curves of dots over a dotted null, in `height` rows, with their names at the right; and the
    first and the last x, or None where there is nothing to draw.

    The scale at the left is that of all of them together, and as high as `span` at least. Where
    curves meet the first one is seen.
    """
    curves = [
        (finite, _COLOURS[i % len(_COLOURS)])
        for i, line in enumerate(lines)
        if len((finite := _finite(line)).x)
    ]
    if not curves:
        return [], None
    below = [] if null is None else [one for one in [_finite(null)] if len(one.x)]
    every = [*curves, *((one, "dim") for one in below)]
    ends = min(line.x[0] for line, _ in every), max(line.x[-1] for line, _ in every)
    low, high = (limit(limit(line.y) for line, _ in every) for limit in (min, max))
    scale = low, max(high, low + (span or 1e-9))
    ticks = {0: f"{scale[1]:.2f}", height - 1: f"{scale[0]:.2f}"}
    margin = max(map(len, ticks.values()))
    labels = _placed(every, scale, height)
    names = max(sum(1 + len(name) for name, _ in row) for row in labels.values())
    across = max(2, width - margin - names - 1)
    cells = [[(" ", "")] * across for _ in range(height)]
    for line in below:
        for column, row, _ in _dots(line, ends, scale, across, height):
            cells[row][column] = ("┈", "dim")
    for place, (dots, style) in _drawn(curves, ends, scale, 2 * across, 4 * height).items():
        cells[place[0]][place[1]] = (chr(_BRAILLE + dots), style)
    rows = []
    for number, marks in enumerate(cells):
        text = Text().append(f"{ticks.get(number, ''):>{margin}} ", "dim")
        for mark, style in marks:
            text.append(mark, style)
        for name, style in labels.get(number, ()):
            text.append(f" {name}", style)
        rows.append(text)
    return rows, ends


def head_map(
    values: np.ndarray[Any, Any], null: float, *, width: int, height: int, colour: bool
) -> list[Text]:
    """The value [layer, head] of every head, from layer 0 down, in at most `height` rows.

    Where there is room, each is a cell with its tenths in it (`.` below one tenth, `+` from 1 on).
    Else with colour two layers share a row, as half blocks, and without it a shade stands for a
    head; and where even that is too much, the highest of several neighbours. `?` or grey is what
    was not measured.
    """
    layers, heads = values.shape
    margin = len(str(max(0, layers - 1))) + 1
    room = max(1, width - margin)
    if layers <= height and 2 * heads <= room:
        rows = []
        for layer, row in enumerate(values):
            text = Text().append(f"{layer:>{margin - 1}} ", "dim")
            for value in row:
                style = _inked(value, null) if colour else ""
                text.append(f" {_tenths(value)}", style)
            rows.append(text)
        return rows
    down, right = math.ceil(layers / (2 * height if colour else height)), math.ceil(heads / room)
    pooled = _pooled(values, down, right)
    rows = []
    for first in range(0, len(pooled), 2 if colour else 1):
        text = Text().append(f"{first * down:>{margin - 1}} ", "dim")
        for column in range(pooled.shape[1]):
            top = pooled[first, column]
            if not colour:
                text.append(_shade(top, null))
            elif first + 1 < len(pooled):
                under = _colour(pooled[first + 1, column], null)
                text.append("▀", f"{_colour(top, null)} on {under}")
            else:
                text.append("▀", _colour(top, null))
        rows.append(text)
    if down * right > 1:
        rows[-1].append(f" (the highest of {down} × {right})", "dim")
    return rows


def _finite(line: Line) -> Line:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x + y)]
    return Line(name=line.name, x=[x for x, _ in known], y=[y for _, y in known])


def _dots(
    line: Line, ends: tuple[float, float], scale: tuple[float, float], columns: int, rows: int
) -> list[tuple[int, int, int]]:
    """Which rows a line goes through in every column that it reaches, counted from the top."""
    places = np.linspace(ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1, columns)
    reached = np.flatnonzero((places >= line.x[0]) & (places <= line.x[-1]))
    if not len(reached):
        reached = np.array([int(np.abs(places - line.x[0]).argmin())])
    value = np.interp(places[reached], line.x, line.y)
    at_row = ((scale[1] - value) / (scale[1] - scale[0]) * (rows - 1)).round().astype(int).tolist()
    dots, before = [], at_row[0]
    for column, row in zip(reached.tolist(), at_row, strict=True):
        # On from the row before, so that steep lines have no gaps.
        first = row if row == before else before + (1 if row > before else -1)
        dots.append((column, min(row, first), max(row, first)))
        before = row
    return dots


def _drawn(
    curves: Sequence[tuple[Line, str]],
    ends: tuple[float, float],
    scale: tuple[float, float],
    columns: int,
    rows: int,
) -> dict[tuple[int, int], tuple[int, str]]:
    """The dots in each character [row, column] that a curve goes through, and its style."""
    cells: dict[tuple[int, int], tuple[int, str]] = {}
    for line, style in curves:
        for column, top, bottom in _dots(line, ends, scale, columns, rows):
            for row in range(top, bottom + 1):
                dots, first = cells.get((row // 4, column // 2), (0, style))
                dot = _DOTS[column % 2][row % 4]
                cells[row // 4, column // 2] = (dots | dot, first)
    return cells


def _placed(
    every: Sequence[tuple[Line, str]], scale: tuple[float, float], height: int
) -> dict[int, list[tuple[str, str]]]:
    """The names, each in the row in which its line ends, and their styles."""
    labels: dict[int, list[tuple[str, str]]] = {}
    for line, style in every:
        row = round((scale[1] - line.y[-1]) / (scale[1] - scale[0]) * (height - 1))
        labels.setdefault(row, []).append((line.name, style))
    return labels


def _pooled(
    values: np.ndarray[Any, Any], down: int, right: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The highest of every block of `down` × `right` values; NaN where none is known."""
    layers, heads = values.shape
    padded = np.full((-(-layers // down) * down, -(-heads // right) * right), -np.inf)
    padded[:layers, :heads] = np.where(np.isnan(values), -np.inf, values)
    blocks = padded.reshape(len(padded) // down, down, -1, right).max(axis=(1, 3))
    return np.where(np.isfinite(blocks), blocks, np.nan)


def _share(value: float, null: float) -> float:
    """How far it has gone from its null to 1."""
    return min(1.0, max(0.0, (value - null) / ((1 - null) or 1)))


def _rgb(value: float, null: float) -> tuple[int, ...]:
    at = _share(value, null) * (len(_RAMP) - 1)
    lower = min(int(at), len(_RAMP) - 2)
    mixed = zip(_RAMP[lower], _RAMP[lower + 1], strict=True)
    return tuple(round(a + (b - a) * (at - lower)) for a, b in mixed)


def _colour(value: float, null: float) -> str:
    if math.isnan(value):
        return _GREY
    return "rgb({},{},{})".format(*_rgb(value, null))


def _inked(value: float, null: float) -> str:
    """The colour as a ground, and on it what can be read."""
    bright = not math.isnan(value) and _share(value, null) > 0.45
    return f"{'rgb(0,0,0)' if bright else 'rgb(255,255,255)'} on {_colour(value, null)}"


def _tenths(value: float) -> str:
    if math.isnan(value):
        return _UNKNOWN
    tenths = math.floor(value * 10 + 1e-6)
    return "." if tenths < 1 else "+" if tenths > 9 else str(tenths)


def _shade(value: float, null: float) -> str:
    if math.isnan(value):
        return _UNKNOWN
    return _SHADES[min(len(_SHADES) - 1, int(_share(value, null) * len(_SHADES)))]
