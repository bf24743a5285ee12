"""A picture of the induction circuit at one step of a run, drawn from the table `circuit`.

Drawing takes matplotlib: `pip install 'phasewatch[pictures]'`.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from monitor.claims import BEYOND, INDUCTION_CIRCUIT, Estimate
from monitor.names import expect_one_of
from monitor.query import read, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".svg", ".png", ".pdf")

# What is said above the picture: never more than the claim.
_TITLES = {
    INDUCTION_CIRCUIT: "Induction circuit: ablating its induction heads hurts more than any "
    "random group",
    "attribution": "Heads that attend and write as in an induction circuit; no cause is shown",
    "pattern": "Heads that attend as in an induction circuit: a pattern only",
    "none": "Heads that attend as induction heads, with no path from a previous-token head",
}
_ABLATION = {
    "passed": "raised the loss on later copies more than any random group did",
    "failed": "did not raise the loss on later copies more than random groups did",
    "not made": "was not measured at this step",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """How the heads are drawn that have edges of one kind."""

    name: str
    shape: str
    colour: str


# Okabe and Ito's colours, which differ for every kind of colour vision; the shapes differ too.
_KINDS = {
    "k": _Look(name="previous-token head", shape="s", colour="#0072B2"),
    "logits": _Look(name="induction head", shape="o", colour="#B34700"),
}
_WHITE: dict[str, Any] = {"color": "white", "fontweight": "bold", "ha": "center", "va": "center"}
_GREY = "#666666"
_MOST_HEADS = 6
_WIDEST = 6.0
_MOST_DEVIATIONS = 20.0
_MOST_TEXTS = 6

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
    if "circuit" not in tables(root):
        raise ValueError(
            f"no table 'circuit' in {root}: expected the root= of a run that was measured with the "
            "probe 'circuit', as it is by default"
        )
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
    sentences.append(f"Ablating the group of induction heads {_ABLATION[test]}.")
    return " ".join(sentences)


def draw(edges: pd.DataFrame) -> Figure:
    """The picture of the rows that `circuit_at` returns.

    Raises `ModuleNotFoundError` where matplotlib is not installed.
    """
    figure_class = _matplotlib_figure()
    every = [_edge(row) for row in edges.to_dict("records")]
    kept = _drawn(every)
    places = _places(kept)
    figure = figure_class(figsize=(8.0, 2.4 + 1.1 * len({y for _, y in places.values()})))
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


def _drawn(edges: Sequence[_Edge]) -> list[_Edge]:
    """The edges of those heads of each kind that have the strongest ones."""
    kept: dict[str, list[Head]] = {}
    for kind in _KINDS:
        ordered = sorted((e for e in edges if e.kind == kind), key=lambda edge: -edge.strength)
        kept[kind] = [*dict.fromkeys(edge.source for edge in ordered)][:_MOST_HEADS]
    return [
        edge
        for edge in edges
        if edge.source in kept[edge.kind]
        and (edge.kind == "logits" or edge.target in kept["logits"])
    ]


def _places(edges: Sequence[_Edge]) -> dict[Head, tuple[float, float]]:
    """Where each head is drawn: in the row of its layer, and in a column of its own, so that no
    line to the logits passes through another head.
    """
    by_kind = [sorted({e.source for e in edges if e.kind == kind}) for kind in _KINDS]
    columns = [head for pair in zip_longest(*by_kind) for head in pair if head is not None]
    layers = sorted({layer for layer, _ in columns})
    return {
        head: ((column + 0.5) / len(columns), float(layers.index(head[0])))
        for column, head in enumerate(columns)
    }


def _draw_edges(
    axes: Axes, edges: Sequence[_Edge], places: Mapping[Head, tuple[float, float]]
) -> None:
    top = 1.0 + max(y for _, y in places.values())
    written = [edge.strength for edge in edges if edge.kind == "logits"]
    full = {"k": _MOST_DEVIATIONS, "logits": max(written)}
    told = _told([edge for edge in edges if edge.kind == "k"])
    for edge in edges:
        x, y = places[edge.source]
        to_x, to_y = places.get(edge.target, (x, top))
        width = _WIDEST * min(1.0, edge.strength / full[edge.kind]) if edge.beyond else 0.0
        axes.plot(
            [x, to_x],
            [y, to_y],
            color=_KINDS[edge.kind].colour if edge.beyond else _GREY,
            linewidth=1.0 + width,
            linestyle={True: "-", False: "--", None: ":"}[edge.beyond],
            solid_capstyle="butt",
            zorder=1,
        )
        along = told.get(edge) if edge.kind == "k" else 1 - 0.45 / (to_y - y)
        if along is not None:
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


def _told(between: Sequence[_Edge]) -> dict[_Edge, float]:
    """The edges between heads that have their numbers beside them, and how far along: all of few,
    of many those that are the strongest to some head.
    """
    edges = sorted(between, key=lambda edge: edge.strength)
    if len(edges) > _MOST_TEXTS:
        edges = [*{edge.target: edge for edge in edges}.values()]
    # Near their ends, those to the same head below each other: so few lie on others.
    places = Counter[Head]()
    told = {}
    for edge in edges:
        told[edge] = 0.72 - 0.16 * places[edge.target] % 0.64
        places[edge.target] += 1
    return told


def _draw_heads(
    axes: Axes, edges: Sequence[_Edge], places: Mapping[Head, tuple[float, float]]
) -> None:
    for kind, look in _KINDS.items():
        heads = sorted({edge.source for edge in edges if edge.kind == kind})
        for (layer, head), name in zip_longest(heads, [look.name][: len(heads)]):
            x, y = places[layer, head]
            axes.scatter(x, y, s=800, marker=look.shape, color=look.colour, zorder=3, label=name)
            axes.text(x, y, f"{layer}.{head}", **_WHITE, zorder=4)


def _finish(axes: Axes, places: Mapping[Head, tuple[float, float]]) -> None:
    rows = sorted({(y, layer) for (layer, _), (_, y) in places.items()})
    axes.set_yticks([y for y, _ in rows], [f"layer {layer}" for _, layer in rows])
    axes.hlines([y for y, _ in rows], 0, 1, color="#e6e6e6", linewidth=1, zorder=0)
    axes.fill_between([0, 1], len(rows) - 0.1, len(rows) + 0.15, color="#333333", linewidth=0)
    axes.text(0.5, len(rows) + 0.02, "logits of the next token", **_WHITE)
    axes.set_xticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.4, len(rows) + 0.2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=8,
        markerscale=0.35,
    )
