"""Draws the picture of several runs on one axis: `python docs/universality.py runs NAME NAME NAME`.

The runs are those of `phasewatch demo --runs 3`. Without names all runs under the root are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

import monitor

_PICTURE = Path(__file__).with_name("universality.png")
_SERIES = (
    ("previous-token head", "previous_token", "best previous-token head", "#3b6fb6"),
    ("induction head", "prefix_matching", "best induction head", "#c2452d"),
)
_DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1)), (0, (6, 1, 1, 1)))


def main() -> None:
    """Writes the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default="runs")
    parser.add_argument("run", nargs="*")
    options = parser.parse_args()
    formed = monitor.formations(options.root, options.run or None)
    pooled = monitor.universality(formed).set_index("event")
    heads = pd.concat(
        monitor.read(options.root, "induction", run) for run in formed["run"].unique()
    )
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for event, field, label, colour in _SERIES:
        of_event = formed[formed["event"] == event]
        _draw_runs(axes, heads, of_event, field, colour)
        row = pooled.loc[event]
        told = f"{label}: formed in {row['formed']} of {row['runs']} runs"
        if row["timed"]:
            told += f"\nat step {row['median']:.0f} ({row['least']:.0f} to {row['most']:.0f})"
        axes.plot([], [], color=colour, linewidth=1.8, label=told)
    axes.set_ylabel("attention")
    axes.set_xlabel("training step")
    axes.set_ylim(-0.02, 1.05)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.76), frameon=False)
    axes.set_title(
        f"The best heads of {formed['run'].nunique()} runs that differ in their seed alone",
        loc="left",
    )
    figure.savefig(_PICTURE, dpi=150)
    plt.close(figure)


def _draw_runs(
    axes: Axes, heads: pd.DataFrame, formed: pd.DataFrame, field: str, colour: str
) -> None:
    """Of each run the best head, a mark where it formed, and of all of them the band of nulls."""
    best = heads.groupby(["run", "step"])[field].max()
    for number, row in enumerate(formed.itertuples()):
        line = best[row.run]
        axes.plot(
            line.index, line, color=colour, linewidth=1.8, linestyle=_DASHES[number % len(_DASHES)]
        )
        if pd.notna(row.step):
            axes.plot(
                row.step, line[row.step], "o", color=colour, markeredgecolor="white", zorder=3
            )
    null = heads.groupby("step")[f"{field}_null"].agg(["min", "max"])
    axes.fill_between(null.index, null["min"], null["max"], color=colour, alpha=0.5, linewidth=1)


if __name__ == "__main__":
    main()
