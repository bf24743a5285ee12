"""Draws the README's picture from the tables of a run: `make picture ARGS="runs demo-seed0-..."`.

Without a run's name the last one under the root is drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import monitor
from monitor.demo.view import half_width

_PICTURE = Path(__file__).with_name("demo.png")
_SERIES = (
    ("previous_token", "previous-token score", "#3b6fb6"),
    ("prefix_matching", "prefix matching (induction)", "#c2452d"),
)


def main() -> None:
    """Writes the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default="runs")
    parser.add_argument("run", nargs="?")
    options = parser.parse_args()
    run = options.run or monitor.read(options.root, "attempts")["run"].max()
    heads = monitor.read(options.root, "induction", run=run)
    in_context = monitor.read(options.root, "in_context", run=run)
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 4.8), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    for field, label, colour in _SERIES:
        _draw_heads(above, heads, field, label, colour)
    above.set_ylabel("attention")
    above.set_ylim(-0.02, 1.05)
    above.legend(loc=(0.5, 0.14), frameon=False)
    error = in_context.apply(half_width, axis=1, field="paired_score")
    _draw(below, in_context["step"], in_context["paired_score"], error, "#2e7d4f")
    below.axhline(0, color="#2e7d4f", linestyle=":", linewidth=1)
    below.set_ylabel("paired in-context\nscore (nats)")
    below.set_xlabel("training step")
    above.set_title(
        "Every head of a 2-layer transformer while it trains on Python source", loc="left"
    )
    figure.savefig(_PICTURE, dpi=150)
    plt.close(figure)


def _draw_heads(axes: Axes, heads: pd.DataFrame, field: str, label: str, colour: str) -> None:
    """All heads thinly, the one that ends highest with its 95% interval, and the null."""
    final = heads[heads["step"] == heads["step"].max()].sort_values(field).iloc[-1]
    for (layer, head), series in heads.groupby(["layer", "head"]):
        if (layer, head) == (final["layer"], final["head"]):
            error = series.apply(half_width, axis=1, field=field)
            name = f"{label}, head {layer}.{head}"
            _draw(axes, series["step"], series[field], error, colour, label=name)
        else:
            axes.plot(series["step"], series[field], color=colour, linewidth=0.6, alpha=0.45)
    null = heads.groupby("step")[f"{field}_null"].first()
    axes.plot(null.index, null, color=colour, linestyle=":", linewidth=1)


def _draw(
    axes: Axes, step: pd.Series, value: pd.Series, error: pd.Series, colour: str, **line: str
) -> None:
    axes.plot(step, value, color=colour, linewidth=1.8, **line)
    axes.fill_between(step, value - error, value + error, color=colour, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    main()
