"""Copying: whether what a head moves makes the token that it looks at more likely.

A head that looks at a token adds W_E W_V W_O W_U of it to the logits (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"): a matrix from tokens to tokens. Its eigenvalues λ
are positive where tokens raise their own logits: the eigenvalue score is Re Σλ / Σ|λ|, 1 for a head
that only copies, -1 for one that only suppresses. The other eigenvalues of that matrix being zero,
they are those of W_O W_U W_E W_V, which is head_feature × head_feature. The direct share asks the
same of single tokens (Olsson et al. 2022): of all that a head adds to the logits of a sample of
tokens, over their mean, which part falls on the token it looks at.

Norms are folded into the matrices; W_U has its mean over the vocabulary taken off, since what is
added to all logits alike changes nothing. The null of the score is a head of random matrices
between the model's own embedding and unembedding.

What fools it: copying is no induction. A model of one layer that copies whatever it looks at scores
1 and predicts nothing: what a head looks at is said by its attention alone.

Shapes: `sample` tokens; heads of `head_feature` numbers; `feature` of the residual stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.estimate import pooled_mean
from monitor.evidence import Evidence
from monitor.parts import Block, Parts
from monitor.parts.folding import (
    NotFoldedError,
    embedded,
    final_norm,
    reading,
    unembedded,
    writing,
)
from monitor.record import HEAD, LAYER, Field, ProbeSpec

SPEC = ProbeSpec(
    name="copying",
    help="Whether what every head writes makes the tokens that it looks at more likely. n is the "
    "number of tokens sampled.",
    source="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    dims=(LAYER, HEAD),
    fields=(
        Field(
            name="eigenvalue_score",
            help="Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their magnitudes.",
            low=-1,
            high=1,
            null="mean of heads of random matrices between the model's own W_E and W_U",
            null_sd=True,
            stderr=False,
            fooled_by="Copying is no induction: a model of one layer scores 1 without any; norms "
            "in later blocks and what MLPs make of it are left out.",
        ),
        Field(
            name="direct_share",
            help="Share of what a head adds to logits, over their mean, that falls on the token it "
            "looks at; mean over sampled tokens.",
            low=0,
            high=1,
            null="1 over the number of tokens sampled",
            fooled_by="Copying is no induction; and a head that raises all frequent tokens alike "
            "hides that it copies.",
        ),
    ),
    needs=(),
    weights=True,
)

_SEED = 0
_SAMPLE = 256
_DRAWS = 64
# So many tokens' rows of the embedding and the unembedding are held at a time, and random heads.
_TOKENS_AT_ONCE, _DRAWS_AT_ONCE = 8192, 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ends:
    """Both ends of every head's path from token to logits: `between` is W_U W_E, from what heads
    write to what they read; `looked_at` and `raised` are rows of W_E and W_U, of sampled tokens.
    """

    between: Float[Tensor, "feature feature"]
    looked_at: Float[Tensor, "sample feature"]
    raised: Float[Tensor, "sample feature"]

    @classmethod
    def of(cls, parts: Parts) -> _Ends:
        """Raises `NotFoldedError` where an end is not known."""
        norm, vocabulary = final_norm(parts), parts.model.vocab_size
        product = unembeddings = embeddings = torch.zeros(())
        for ids in torch.arange(vocabulary).split(_TOKENS_AT_ONCE):
            unembedding = unembedded(parts, ids)
            embedding = embedded(parts, ids).to(unembedding)
            product = product + unembedding.T @ embedding
            unembeddings, embeddings = (
                unembeddings + unembedding.sum(0),
                embeddings + embedding.sum(0),
            )
        between = product - torch.outer(unembeddings, embeddings) / vocabulary
        random = torch.Generator().manual_seed(_SEED)
        sample = torch.randperm(vocabulary, generator=random)[:_SAMPLE]
        raised = unembedded(parts, sample)
        return cls(
            between=between if norm is None else norm.read(between.mT).mT,
            looked_at=embedded(parts, sample).to(raised),
            raised=raised if norm is None else norm.read(raised),
        )


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a head; head -1 stands for heads of a layer of which nothing is known."""
    parts = evidence.known_parts()
    rows: list[dict[str, Any]] = []
    nulls: dict[int, tuple[float, float]] = {}
    ends, why = None, ""
    try:
        ends = _Ends.of(parts)
    except NotFoldedError as error:
        why = str(error)
    for block in parts.blocks:
        try:
            if ends is None:
                raise NotFoldedError(why)
            rows += _measured(parts, block, ends, nulls)
        except NotFoldedError as error:
            heads = [-1] if block.heads is None else range(block.heads)
            rows += [_unmeasured(block.layer, head, str(error)) for head in heads]
    if not parts.blocks:
        rows = [_unmeasured(-1, -1, parts.reasons.get("blocks", "no blocks were found"))]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _measured(
    parts: Parts, block: Block, ends: _Ends, nulls: dict[int, tuple[float, float]]
) -> list[dict[str, Any]]:
    """The rows of a block's heads; raises `NotFoldedError` where their matrices are not known."""
    read = reading(parts, block, "value").to(ends.between)
    write = writing(parts, block).to(ends.between)
    circuits = around(read, write, ends.between)
    size = circuits.shape[-1]
    if size not in nulls:
        nulls[size] = _null(ends.between, size)
    shares = direct_shares(read, write, ends.looked_at, ends.raised)
    share, stderr = pooled_mean(shares, torch.ones(len(shares), device=shares.device))
    # Beyond this all that is left of a head that writes nothing to the logits is rounding.
    least = 16 * torch.finfo(circuits.dtype).eps * _size(write) * _size(read) * _size(ends.between)
    rows = []
    for head, circuit in enumerate(circuits.cpu()):
        row = _unmeasured(block.layer, head, "ok")
        if not torch.isfinite(circuit).all():
            row["validity"] = "its weights are not finite"
        elif not _size(circuit) > least[head]:
            row["validity"] = "what it writes does not reach the logits"
        else:
            row["eigenvalue_score"] = float(eigenvalue_score(circuit))
            row["eigenvalue_score_null"], row["eigenvalue_score_null_sd"] = nulls[size]
            row["direct_share"], row["direct_share_stderr"] = (
                float(share[head]),
                float(stderr[head]),
            )
            row["direct_share_null"] = 1 / len(shares)
            row["n"] = len(shares)
        rows.append(row)
    return rows


def _unmeasured(layer: int, head: int, why: str) -> dict[str, Any]:
    columns = dict.fromkeys(column for field in SPEC.fields for column in field.columns)
    return {"layer": layer, "head": head, **columns, "n": 0, "validity": why}


def around(
    read: Float[Tensor, "head feature head_feature"],
    write: Float[Tensor, "head head_feature feature"],
    between: Float[Tensor, "feature feature"],
) -> Float[Tensor, "head head_feature head_feature"]:
    """What has the eigenvalues of W_E W_V W_O W_U that are not zero: W_O W_U W_E W_V."""
    return (write @ between) @ read


def eigenvalue_score(
    matrix: Float[Tensor, "*several size size"],
) -> Float[Tensor, " *several"]:
    """Sum of the eigenvalues over the sum of their magnitudes.

    >>> round(float(eigenvalue_score(torch.tensor([[3.0, 1.0], [0.0, -1.0]]))), 6)
    0.5
    """
    eigenvalues = torch.linalg.eigvals(matrix)
    score: Tensor = eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
    return score


def direct_shares(
    read: Float[Tensor, "head feature head_feature"],
    write: Float[Tensor, "head head_feature feature"],
    looked_at: Float[Tensor, "sample feature"],
    raised: Float[Tensor, "sample feature"],
) -> Float[Tensor, "sample head"]:
    """Of all that a head that looks at a sampled token adds to their logits, over the mean, the
    share of the token itself.
    """
    logits = (looked_at @ read) @ (write @ (raised - raised.mean(0)).T)
    above = logits.relu()
    own = above.diagonal(dim1=-2, dim2=-1)
    return (own / above.sum(-1).clamp(min=torch.finfo(above.dtype).tiny)).T


def _null(between: Float[Tensor, "feature feature"], size: int) -> tuple[float, float]:
    """Mean and standard deviation of the score of heads of random matrices."""
    random = torch.Generator().manual_seed(_SEED)
    features, scores = len(between), []
    for _ in range(_DRAWS // _DRAWS_AT_ONCE):
        drawn = torch.randn(2, _DRAWS_AT_ONCE, features, size, generator=random).to(between)
        circuits = around(drawn[0], drawn[1].mT, between).cpu()
        if not torch.isfinite(circuits).all():
            return math.nan, math.nan
        scores.append(eigenvalue_score(circuits))
    every = torch.cat(scores)
    return float(every.mean()), float(every.std())


def _size(matrix: Float[Tensor, "*several row column"]) -> Float[Tensor, " *several"]:
    size: Tensor = torch.linalg.matrix_norm(matrix)
    return size.cpu()
