"""Draws the README's pictures of a run from its tables, and takes that of its page in Chromium:
`make picture ARGS="runs demo-seed0-..."`.

Without a run's name the last one under the root is drawn.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from urllib.parse import urlencode

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from playwright.sync_api import sync_playwright

import monitor
from monitor.demo.view import CONCEPTS, LAYER, followed
from monitor.service import Service
from monitor.terminal.saying import called, half_width

_HEADS = Path(__file__).with_name("demo.png")
_CONCEPTS = Path(__file__).with_name("concepts.png")
_PAGE = Path(__file__).with_name("page.png")
_SERIES = (
    ("previous_token", "previous-token score", "#3b6fb6"),
    ("prefix_matching", "prefix matching (induction)", "#c2452d"),
)
_COLOURS = ("#3b6fb6", "#c2452d", "#2e7d4f")


def main() -> None:
    """Writes the pictures beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default="runs")
    parser.add_argument("run", nargs="?")
    options = parser.parse_args()
    run = options.run or monitor.read(options.root, "attempts")["run"].max()
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    _heads(options.root, run)
    _concepts(options.root, run)
    _page(options.root, run)


def _heads(root: str, run: str) -> None:
    """Attention heads, and the in-context score."""
    heads = monitor.read(root, "induction", run=run)
    in_context = monitor.read(root, "in_context", run=run)
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
    figure.savefig(_HEADS, dpi=150)
    plt.close(figure)


def _concepts(root: str, run: str) -> None:
    """How well concepts can be read off along their directions, and how these settle."""
    rows = followed(monitor.read(root, "concepts", run=run))
    settled = followed(monitor.settling(root, run))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.2, 4.8), sharex=True, layout="constrained"
    )
    for name, colour in zip(CONCEPTS, _COLOURS, strict=True):
        own = rows[(rows["concept"] == name) & (rows["validity"] == "ok")]
        error = own.apply(half_width, axis=1, field="auc")
        _draw(above, own["step"], own["auc"], error, colour, label=called(name))
        own = settled[settled["concept"] == name]
        below.plot(own["step"], own["cosine"], color=colour, linewidth=1.8)
        below.plot(own["step"], own["cosine_null"], color=colour, linestyle=":", linewidth=1)
    above.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    above.set_ylabel("held-out AUC")
    above.legend(loc="lower right", frameon=False)
    below.set_ylabel("cosine with the\ndirection at the end")
    below.set_xlabel("training step")
    above.set_title(f"Concepts of Python in the residual stream after block {LAYER}", loc="left")
    figure.savefig(_CONCEPTS, dpi=150)
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


def _page(root: str, run: str) -> None:
    """The top of the live page."""
    service = Service(root, port=0)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1180})
            page.goto(f"{service.url}/#/run?{urlencode({'run': run})}")
            for figure in ("loss", "score", "heads"):
                page.wait_for_selector(f'[data-figure="{figure}"] .legend li')
            page.screenshot(path=_PAGE)
            browser.close()
    finally:
        service.close()


if __name__ == "__main__":
    main()
