"""The induction circuit as a graph: previous-token heads → induction heads → logits.

A head of a layer moves each token one position on; an induction head of a later layer finds by its
keys what followed earlier copies of a token (K-composition), and writes it to the logits (Elhage et
al. 2021). The edges are those between heads that `heads` labels so, with what their weights and
their writing say of each.

What fools it: heads that look right need not work together, and composition is no cause. So
`claim` says of the whole graph what is shown of at least one path through it, and it is called an
induction circuit only where ablating its induction heads raised the loss on later copies more than
any random group, and ablating its previous-token heads did, or was not tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monitor.claims import BEYOND, INDUCTION_CIRCUIT, LEVELS, Estimate, columns_of, rows
from monitor.evidence import Evidence
from monitor.record import Dim, Field, ProbeSpec

SPEC = ProbeSpec(
    name="circuit",
    help="The graph of previous-token heads, induction heads and logits, an edge a row, of at most "
    "16 heads of each label; a row without heads, whose validity says so, where there is none.",
    source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; Olsson et al. "
    "2022, In-context Learning and Induction Heads",
    dims=(
        Dim(name="source_layer", help="Layer of the head that writes, counted from 0."),
        Dim(name="source_head", help="That head within its layer."),
        Dim(name="target_layer", help="Layer of the head that reads; -1: the logits."),
        Dim(name="target_head", help="That head within its layer; -1: the logits."),
        Dim(name="kind", help="k (a head's keys), logits, or none.", text=True),
    ),
    fields=(
        Field(
            name="claim",
            help="How much is shown of a path through the whole graph: none, pattern, attribution "
            "or induction circuit; the same on every row. Missing where no edge was found and some "
            "heads could not be judged.",
            fooled_by="It is said of the graph, not of each of its edges.",
            stderr=False,
            text=True,
        ),
        Field(
            name="causal_test",
            help="Whether ablating the induction heads of the graph raises the loss on later "
            "copies more than any random group of heads: passed, failed or not made.",
            fooled_by="A group passes as a whole, with heads in it that have no part in it.",
            stderr=False,
            text=True,
        ),
        Field(
            name="key_composition",
            help="Of k edges: how much of what the source writes the target's keys read; see "
            "`composition`. Missing where that does not have it.",
            low=0,
            high=1,
            null="the mean over random matrices of the same shape",
            fooled_by="Matrices may compose where nothing is written or read.",
            stderr=False,
            null_sd=True,
        ),
        Field(
            name="contrast",
            help="Of edges to the logits: what the head adds to the correct next token's logit on "
            "later copies, beyond what it adds to a shuffled target's; see `attribution`.",
            unit="logits",
            null="0: no more than to a shuffled target",
            fooled_by="It sees the direct path alone.",
        ),
    ),
    needs=(),
    reads=("heads", "composition"),
)

# Of each label: all pairs of them are edges.
_MOST_HEADS = 16

Head = tuple[int, int]
Row = Mapping[str, Any]


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row an edge, from the tables `heads` and `composition`."""
    heads = rows(evidence.tables["heads"])
    previous, inducing = (_foremost(heads, label) for label in ("previous-token", "induction"))
    if not inducing:
        return _no_edges(heads)
    composed = {
        (_head(row, "source_"), _head(row, "target_")): Estimate.of(row, "ratio")
        for row in rows(evidence.tables.get("composition"))
        if row["kind"] == "k"
    }
    pairs = [(s, t) for t in inducing for s in previous if s["layer"] < t["layer"]]
    composing = {(_head(s), _head(t)): composed.get((_head(s), _head(t))) for s, t in pairs}
    words = {
        "claim": _claim(pairs, composing),
        "causal_test": _together([row["causal_test"] for row in inducing]),
    }
    edges = [
        _edge(_head(s), _head(t), "k", {"key_composition": composing[_head(s), _head(t)]})
        for s, t in pairs
    ]
    edges += [
        _edge(_head(row), (-1, -1), "logits", {"contrast": Estimate.of(row, "contrast")})
        for row in inducing
    ]
    shared = {**words, "n": inducing[0]["n"], "validity": "ok"}
    return {
        **{column: [edge[column] for edge in edges] for column in edges[0]},
        **{column: [value] * len(edges) for column, value in shared.items()},
    }


def _head(row: Row, of: str = "") -> Head:
    return row[f"{of}layer"], row[f"{of}head"]


def _foremost(heads: Sequence[Row], label: str) -> list[Row]:
    """The heads of this label, as far as they fit: first those of which most is claimed."""
    own = [row for row in heads if row["label"] == label]
    foremost = sorted(own, key=lambda row: (LEVELS.index(row["claim"]), row["excess"]))
    return sorted(foremost[-_MOST_HEADS:], key=_head)


def _edge(
    source: Head, target: Head, kind: str, numbers: Mapping[str, Estimate | None]
) -> dict[str, Any]:
    dims = (*source, *target, kind)
    edge: dict[str, Any] = dict(zip((dim.name for dim in SPEC.dims), dims, strict=True))
    for field in SPEC.fields:
        if field.is_number:
            edge |= columns_of(field, numbers.get(field.name))
    return edge


def _no_edges(heads: Sequence[Row]) -> dict[str, Any]:
    """The row of a measurement at which there is nothing to draw: the step stays visible."""
    unclear = [row["validity"] for row in heads if row["validity"] != "ok"]
    words: dict[str, str | None] = {
        "claim": "none",
        "causal_test": "not made",
        "validity": "no head attends as in an induction circuit",
    }
    if unclear:
        # Any of the heads that were not seen could be one.
        words = {"claim": None, "causal_test": None, "validity": unclear[0]}
    edge = _edge((-1, -1), (-1, -1), "none", {}) | {"n": heads[0]["n"], **words}
    return {column: [value] for column, value in edge.items()}


def _together(tests: Sequence[str]) -> str:
    return next((result for result in ("passed", "failed") if result in tests), "not made")


def _claim(
    pairs: Sequence[tuple[Row, Row]], composing: Mapping[tuple[Head, Head], Estimate | None]
) -> str:
    """What is shown of the path through the graph of which most is."""

    def level(source: Row, target: Row) -> int:
        edge = composing[_head(source), _head(target)]
        if edge is None or not edge.beyond(BEYOND["key_composition"]):
            return LEVELS.index("pattern")
        shown = LEVELS.index(target["claim"])
        if source["causal_test"] == "failed":
            return min(shown, LEVELS.index("attribution"))
        return shown

    best = LEVELS[max((level(source, target) for source, target in pairs), default=0)]
    return INDUCTION_CIRCUIT if best == "causal" else best
