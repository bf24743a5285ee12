"""A picture of the induction circuit at one step of a run, drawn from the table `circuit`.

Drawing takes matplotlib: `pip install 'phasewatch[pictures]'`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from monitor.claims import BEYOND, INDUCTION_CIRCUIT, Estimate
from monitor.query import read, tables
from monitor.record import expect_one_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")

# What is said above the picture: never more than the claim.
_TITLES = {
    INDUCTION_CIRCUIT: "Induction circuit: ablating it hurts more than ablating random heads",
    "attribution": "Heads that attend and write as in an induction circuit; no cause is shown",
    "pattern": "Heads that attend as in an induction circuit: a pattern only",
    "none": "Heads that attend as induction heads, with no path from a previous-token head",
}
_ABLATION = {
    "passed": "raised the loss on later copies more than any random group did",
    "failed": "did not raise the loss on later copies more than random groups did",
    "not made": "was not measured at this step",
}

# Okabe and Ito's colours, which differ for every kind of colour vision; the shapes differ too.
_KINDS = {"k": ("previous-token head", "#0072B2"), "logits": ("induction head", "#B34700")}
_GREY = "#666666"
_MOST_HEADS = 6
_WIDEST = 6.0
_MOST_DEVIATIONS = 20.0
_MOST_TEXTS = 16
_LOGITS = (-1, -1)

Head = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edge:
    """An edge: its number in words, how strong it is, and whether that is beyond chance (None: it
    was not measured).
    """

    source: Head
    target: Head
    kind: str
    text: str = ""
    strength: float = -math.inf
    beyond: bool | None = None


def circuit_at(root: str | Path, run: str | None = None, step: int | None = None) -> pd.DataFrame:
    """The rows of `circuit` at one step of one run.

    By default of the run that was measured last, at its last step with edges. Raises
    `FileNotFoundError` where there is no such folder, `ValueError` where there is no such table,
    run or step, or no edge, naming what there is.
    """
    expect_one_of(f"table in {root}", "circuit", tables(root))
    circuit = read(root, "circuit", run=run)
    if run is None:
        run = str(circuit["run"].iloc[int(circuit["time"].argmax())])
    circuit = circuit[circuit["run"] == run]
    edges = circuit[circuit["kind"] != "none"]
    steps = sorted(edges["step"].unique().tolist())
    if not steps:
        reasons = "; ".join(circuit["validity"].unique())
        raise ValueError(
            f"run {run!r} shows no circuit at any of its {circuit['step'].nunique()} measurements "
            f"({reasons}): train on, or name another run"
        )
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda known: abs(known - step))
        raise ValueError(
            f"run {run!r} has no edges at step {step}; it has some at {len(steps)} steps from "
            f"{steps[0]} to {steps[-1]}, the nearest {nearest}"
        )
    return edges[edges["step"] == (steps[-1] if step is None else step)]


def title(edges: pd.DataFrame) -> str:
    """What these rows show of a circuit, in words that say no more than their claim."""
    return _TITLES[edges.iloc[0]["claim"]]


def caption(edges: pd.DataFrame) -> str:
    """What the picture of these rows shows, with the nulls, in words."""
    (n,), (test,) = edges["n"].unique(), edges["causal_test"].unique()
    nulls = edges.dropna(subset=["key_composition_null"])
    sentences = []
    if len(nulls):
        null, spread = nulls[["key_composition_null", "key_composition_null_sd"]].mean()
        sentences.append(
            "Between heads: composition of what the lower one writes with the keys of the upper "
            f"one; random matrices give {null:.3f}, standard deviation {spread:.3f}."
        )
    sentences.append(
        "To the logits: what a head adds to the correct next token's logit beyond a shuffled "
        f"target's (null 0), ± its standard error over {n} sequences."
    )
    sentences.append(
        "Solid lines are beyond chance (3 and 2 standard deviations), dashed ones not, dotted ones "
        "not measured; wider is stronger."
    )
    sentences.append(f"Ablating the induction heads {_ABLATION[test]}.")
    return " ".join(sentences)


def draw(edges: pd.DataFrame) -> Figure:
    """The picture of the rows that `circuit_at` returns.

    Raises `ModuleNotFoundError` where matplotlib is not installed.
    """
    figure_class = _matplotlib_figure()
    every = [_edge(row) for row in edges.to_dict("records")]
    kept = _strongest(every)
    places = _places(kept)
    figure = figure_class(figsize=(8.0, 2.4 + 1.3 * len({y for _, y in places.values()})))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    _draw_edges(axes, kept, places)
    _draw_heads(axes, kept, places)
    _finish(axes, places)
    run, step = edges.iloc[0][["run", "step"]]
    figure.suptitle(title(edges), x=0.02, ha="left", fontsize=11, fontweight="bold")
    axes.set_title(f"run {run}, step {step}", loc="left", fontsize=9, color=_GREY)
    below = caption(edges)
    if left_out := len({e.source for e in every}) - len({e.source for e in kept}):
        below += f" Not drawn: {left_out} heads with weaker edges."
    figure.supxlabel(textwrap.fill(below, 125), x=0.02, ha="left", fontsize=8, color="#333333")
    return figure


def save(edges: pd.DataFrame, output: str | Path) -> Path:
    """Draws the rows into a file, an SVG, PNG or PDF by its name.

    Raises `ValueError` for any other, and `ModuleNotFoundError` where matplotlib is missing.
    """
    path = Path(output)
    expect_one_of(f"kind of picture in output={str(output)!r}", path.suffix.lower(), FORMATS)
    figure = draw(edges)
    from matplotlib import rc_context

    # The same rows give the same bytes, and text stays text: it can be searched and read out.
    about: dict[str, str | None] = {"Title": title(edges)}
    if path.suffix.lower() == ".svg":
        about |= {"Description": caption(edges), "Date": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "phasewatch"}):
        figure.savefig(path, dpi=150, metadata=about)
    return path


def _matplotlib_figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing takes matplotlib, which is not installed: pip install 'phasewatch[pictures]'",
            name=error.name,
        ) from error
    return Figure


def _edge(row: Mapping[Hashable, Any]) -> _Edge:
    field = {"k": "key_composition", "logits": "contrast"}[row["kind"]]
    source = (row["source_layer"], row["source_head"])
    target = (row["target_layer"], row["target_head"])
    estimate = None if math.isnan(row[field]) else Estimate.of(row, field)
    if estimate is None:
        return _Edge(source=source, target=target, kind=row["kind"])
    distance = estimate.value - estimate.null
    if row["kind"] == "k":
        deviations = distance / (estimate.null_sd or math.inf)
        text, strength = f"{estimate.value:.2f} ({deviations:+.0f} sd)", deviations
    else:
        text, strength = f"{estimate.value:+.2f} ± {estimate.stderr:.2f}", distance
    return _Edge(
        source=source,
        target=target,
        kind=row["kind"],
        text=text,
        strength=strength,
        beyond=estimate.beyond(BEYOND[field]),
    )


def _strongest(edges: Sequence[_Edge]) -> list[_Edge]:
    """The edges between the heads of each kind that have the strongest ones, and the logits."""
    kept: set[tuple[str, Head]] = set()
    for kind in _KINDS:
        ordered = sorted((e for e in edges if e.kind == kind), key=lambda e: -e.strength)
        kept |= {(kind, head) for head in [*dict.fromkeys(e.source for e in ordered)][:_MOST_HEADS]}
    return [
        edge
        for edge in edges
        if (edge.kind, edge.source) in kept
        and (edge.kind == "logits" or ("logits", edge.target) in kept)
    ]


def _places(edges: Sequence[_Edge]) -> dict[Head, tuple[float, float]]:
    """Where each head is drawn: a row for every layer that has one, and the logits on top."""
    heads = sorted({edge.source for edge in edges})
    layers = sorted({layer for layer, _ in heads})
    places: dict[Head, tuple[float, float]] = {_LOGITS: (0.5, float(len(layers)))}
    for height, layer in enumerate(layers):
        row = [head for head in heads if head[0] == layer]
        for place, head in enumerate(row, start=1):
            # Heads right above each other would hide the edges between those around them.
            shift = 0.06 * (-1) ** height if len(layers) > 2 else 0.0
            places[head] = (place / (len(row) + 1) + shift, float(height))
    return places


def _draw_edges(
    axes: Axes, edges: Sequence[_Edge], places: dict[Head, tuple[float, float]]
) -> None:
    largest = max((e.strength for e in edges if e.kind == "logits"), default=0.0)
    full = {"k": _MOST_DEVIATIONS, "logits": largest if largest > 0 else 1.0}
    styles = {True: "-", False: "--", None: ":"}
    for number, edge in enumerate(edges):
        (x, y), (to_x, to_y) = places[edge.source], places[edge.target]
        colour = _KINDS[edge.kind][1] if edge.beyond else _GREY
        width = 1.0 + _WIDEST * min(1.0, max(0.0, edge.strength / full[edge.kind]))
        axes.plot(
            [x, to_x],
            [y, to_y],
            color=colour,
            linewidth=width if edge.beyond else 1.0,
            linestyle=styles[edge.beyond],
            solid_capstyle="butt",
            zorder=1,
        )
        if edge.text and (edge.beyond or len(edges) <= _MOST_TEXTS):
            # Not all at the same height, or those of edges that cross would lie on each other.
            along = (0.36, 0.5, 0.64)[number % 3]
            axes.text(
                x + along * (to_x - x),
                y + along * (to_y - y),
                edge.text,
                fontsize=7.5,
                ha="center",
                va="center",
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
            )


def _draw_heads(
    axes: Axes, edges: Sequence[_Edge], places: dict[Head, tuple[float, float]]
) -> None:
    shapes = {"k": "s", "logits": "o"}
    for kind, (name, colour) in _KINDS.items():
        heads = sorted({edge.source for edge in edges if edge.kind == kind})
        for number, head in enumerate(heads):
            x, y = places[head]
            label = name if number == 0 else None
            axes.scatter(x, y, s=900, marker=shapes[kind], color=colour, zorder=3, label=label)
            axes.text(
                x,
                y,
                f"{head[0]}.{head[1]}",
                color="white",
                fontweight="bold",
                ha="center",
                va="center",
                zorder=4,
            )
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#333333", "edgecolor": "none"}
    x, y = places[_LOGITS]
    axes.text(
        x,
        y,
        "logits of the next token",
        color="white",
        ha="center",
        va="center",
        bbox=box,
        zorder=4,
    )


def _finish(axes: Axes, places: dict[Head, tuple[float, float]]) -> None:
    rows = {height: layer for (layer, _), (_, height) in places.items() if layer >= 0}
    axes.set_yticks([*rows], [f"layer {layer}" for layer in rows.values()])
    axes.set_xticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(rows) + 0.4)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower right", frameon=False, fontsize=8, markerscale=0.35, bbox_to_anchor=(1, 1)
    )
