"""Composition: how much of what one head writes another reads, by their matrices alone.

Of what an earlier head writes, a later one may read into its queries, keys or values: for W_A the
earlier head's W_V W_O and W_B what the later one makes of the stream, the composition is
‖W_A W_B‖ / (‖W_A‖ ‖W_B‖), in Frobenius norms (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"). W_B is W_K W_Qᵀ for keys, W_Q W_Kᵀ for queries and W_V W_O for values. Even
random matrices compose: the excess is over their mean, and the null's standard deviation beside it.

All matrices are thin products, so no feature × feature matrix is ever made: ‖A B C D‖ is that of
R_A B C R_D, where R_A and R_D are the triangles of A = Q R and Dᵀ = Q R, and B C of all heads of
two layers is one product. Norms are folded into the matrices.

What fools it: that matrices fit is no cause. The later head need never look where the earlier one
wrote, and what it makes of that need never be read; and a head that matters may lie below the null.

Shapes: heads of `head_feature` numbers; `feature` of the residual stream.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from monitor.claims import rows
from monitor.evidence import Evidence
from monitor.parts import Block, Parts
from monitor.parts.folding import NotFoldedError, reading, writing
from monitor.record import Dim, Field, ProbeSpec

_FOOLED_BY = (
    "Matrices that fit are no cause: the later head need not look where the earlier one wrote, nor "
    "need what it makes of that be read. Rotations by position are left out; and a norm whose gain "
    "is large in few features makes all heads seem to compose."
)

SPEC = ProbeSpec(
    name="composition",
    help="How much of what earlier heads write later heads read: the 64 strongest pairs of each "
    "kind, and of kind k all pairs of the 16 heads with most `previous_token` and the 16 with most "
    "`prefix_matching` (see `induction`). n is the number of random pairs that their null is of.",
    source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    dims=(
        Dim(name="source_layer", help="Block of the head that writes; -1: none in particular."),
        Dim(name="source_head", help="The head that writes, within its layer; -1: none."),
        Dim(name="target_layer", help="Block of the head that reads; -1: none in particular."),
        Dim(name="target_head", help="The head that reads, within its layer; -1: none."),
        Dim(
            name="kind",
            help="What it reads into: q (queries), k (keys) or v (values); empty: none.",
            text=True,
        ),
    ),
    fields=(
        Field(
            name="ratio",
            help="Norm of the product of both heads' matrices, over the product of their norms.",
            low=0,
            high=1,
            null="mean of random matrices of the same shapes",
            null_sd=True,
            stderr=False,
            fooled_by=_FOOLED_BY,
        ),
        Field(
            name="excess",
            help="The ratio minus its null.",
            low=-1,
            high=1,
            null="0: random matrices of the same shapes",
            null_sd=True,
            stderr=False,
            fooled_by=_FOOLED_BY,
        ),
    ),
    needs=(),
    reads=("induction",),
    weights=True,
)

_STRONGEST = 64
# Of each side of an induction circuit: whether these compose is to be known however little they do.
_FOREMOST = 16
_SEED = 0
# Random heads on either side of the null: all pairs of them are taken.
_DRAWN = 16
_KINDS = ("q", "k", "v")

# Layer and head of the one that writes, and of the one that reads.
Pair = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Edge:
    """A pair of heads, and by how many standard deviations they compose more than random ones."""

    sds: float
    ratio: float
    null: float
    null_sd: float
    heads: Pair


def compute(evidence: Evidence) -> dict[str, Any]:
    """The strongest pairs of each kind and those of a circuit; and a row for each layer whose
    matrices are not known.
    """
    parts = evidence.known_parts()
    always = {kind: frozenset[Pair]() for kind in _KINDS}
    always["k"] = _of_a_circuit(rows(evidence.tables.get("induction")))
    missing: dict[tuple[int, int, str], str] = {}
    triangles: dict[int, Tensor] = {}
    edges: dict[str, list[_Edge]] = {kind: [] for kind in _KINDS}
    for block in parts.blocks[:-1]:
        try:
            writing(parts, block)
            triangles[block.layer] = triangle(reading(parts, block, "value"))
        except NotFoldedError as error:
            missing |= {(block.layer, -1, kind): str(error) for kind in _KINDS}
    for block in parts.blocks[1:]:
        reads, unknown = _reads(parts, block)
        missing |= {(-1, block.layer, kind): why for kind, why in unknown.items()}
        for source in parts.blocks[: block.layer]:
            if source.layer in triangles and reads:
                # Made anew for every pair: those of all layers are as large as the weights.
                write = triangles[source.layer] @ writing(parts, source)
                for kind, read in reads.items():
                    found = _edges(write.to(read), read, source.layer, block.layer, always[kind])
                    edges[kind] = _kept([*edges[kind], *found], always[kind])
    if not parts.blocks:
        missing[-1, -1, ""] = parts.reasons.get("blocks", "no blocks were found")
    told = [_row(edge.heads, kind, edge) for kind, found in edges.items() for edge in found]
    told += [_row((s, -1, t, -1), kind, why) for (s, t, kind), why in missing.items()]
    if not told:
        told = [_row((-1, -1, -1, -1), "", "no two layers have heads that write and read")]
    return {name: [row[name] for row in told] for name in told[0]}


def _of_a_circuit(heads: Sequence[Mapping[str, Any]]) -> frozenset[Pair]:
    """The pairs of those heads that attend most as an induction circuit's do."""
    writing_heads, reading_heads = (
        sorted((row for row in heads if row["validity"] == "ok"), key=lambda row: -row[score])[
            :_FOREMOST
        ]
        for score in ("previous_token", "prefix_matching")
    )
    return frozenset(
        (source["layer"], source["head"], target["layer"], target["head"])
        for source in writing_heads
        for target in reading_heads
        if source["layer"] < target["layer"]
    )


def _reads(parts: Parts, block: Block) -> tuple[dict[str, Tensor], dict[str, str]]:
    """By kind what a block's heads read, or why that is not known."""
    reads, unknown = {}, {}
    for kind in _KINDS:
        try:
            if kind == "v":
                into, then = reading(parts, block, "value"), writing(parts, block).mT
            elif kind == "q":
                into, then = reading(parts, block, "query"), reading(parts, block, "key")
            else:
                into, then = reading(parts, block, "key"), reading(parts, block, "query")
            reads[kind] = into @ triangle(then).mT
        except NotFoldedError as error:
            unknown[kind] = str(error)
    return reads, unknown


def _edges(
    write: Float[Tensor, "source size feature"],
    read: Float[Tensor, "target feature other"],
    source: int,
    target: int,
    always: frozenset[Pair],
) -> list[_Edge]:
    """The strongest pairs of two layers and those of `always`; none where a head's matrices are
    zero.
    """
    found = ratios(write, read).cpu()
    mean, sd = null(write.shape[2], write.shape[1], read.shape[2])
    found = found.where(torch.isfinite(found), -math.inf)
    chosen = set(found.flatten().topk(min(_STRONGEST, found.numel())).indices.tolist())
    sources, targets = found.shape
    chosen |= {
        writes * targets + reads
        for writing_layer, writes, reading_layer, reads in always
        if (writing_layer, reading_layer) == (source, target)
        # Layers that attend need not be the blocks that were found.
        and writes < sources
        and reads < targets
    }
    order = sorted(chosen)
    return [
        _Edge(
            sds=(value - mean) / sd,
            ratio=value,
            null=mean,
            null_sd=sd,
            heads=(source, index // targets, target, index % targets),
        )
        for index, value in zip(order, found.flatten()[order].tolist(), strict=True)
        if math.isfinite(value)
    ]


def _kept(edges: list[_Edge], always: frozenset[Pair]) -> list[_Edge]:
    ordered = sorted(edges, key=lambda edge: (-edge.sds, edge.heads))
    return ordered[:_STRONGEST] + [one for one in ordered[_STRONGEST:] if one.heads in always]


def _row(heads: Pair, kind: str, edge: _Edge | str) -> dict[str, Any]:
    """A pair's row, or one that says why there is none."""
    names = ("source_layer", "source_head", "target_layer", "target_head")
    row: dict[str, Any] = {**dict(zip(names, heads, strict=True)), "kind": kind}
    if isinstance(edge, str):
        columns = dict.fromkeys(column for field in SPEC.fields for column in field.columns)
        return {**row, **columns, "n": 0, "validity": edge}
    return row | {
        "ratio": edge.ratio,
        "ratio_null": edge.null,
        "ratio_null_sd": edge.null_sd,
        "excess": edge.ratio - edge.null,
        "excess_null": 0.0,
        "excess_null_sd": edge.null_sd,
        "n": _DRAWN**2,
        "validity": "ok",
    }


def triangle(
    matrix: Float[Tensor, "head feature size"],
) -> Float[Tensor, "head size size"]:
    """R of Q R: it has the norm of `matrix`, as has R X that of `matrix` X for every X."""
    found: Tensor = torch.linalg.qr(matrix, mode="r").R
    return found


def ratios(
    write: Float[Tensor, "source size feature"], read: Float[Tensor, "target feature other"]
) -> Float[Tensor, "source target"]:
    """The composition of all pairs of heads of two layers, from R_A B of those that write and
    C R_Dᵀ of those that read; not a number where one of them is zero.
    """
    wide = rearrange(read, "target feature other -> feature (target other)")
    product = rearrange(write, "source size feature -> (source size) feature") @ wide
    squares = reduce(
        product.square(),
        "(source size) (target other) -> source target",
        "sum",
        source=len(write),
        target=len(read),
    )
    norms = torch.outer(torch.linalg.matrix_norm(write), torch.linalg.matrix_norm(read))
    return squares.sqrt() / norms


@functools.cache
def null(features: int, size: int, other: int) -> tuple[float, float]:
    """Mean and standard deviation of the composition of random heads of these shapes.

    >>> mean, sd = null(64, 16, 16)
    >>> round(mean, 3), sd < 0.01
    (0.125, True)
    """
    random = torch.Generator().manual_seed(_SEED)

    def drawn(columns: int) -> Tensor:
        return torch.randn(_DRAWN, features, columns, generator=random)

    write = triangle(drawn(size)) @ drawn(size).mT
    found = ratios(write, drawn(other) @ triangle(drawn(other)).mT)
    return float(found.mean()), float(found.std())
