"""The matrices with which heads read the residual stream and write it, norms included.

Whatever reads the stream through a norm reads a multiple of x C diag(γ) W of the stream x: C takes
the mean off where the norm does, γ is its gain, and the multiple is one positive number a position.
So C diag(γ) W is the matrix, up to scale, by which it reads; what a norm makes of what is written,
and the final norm before the unembedding, are folded likewise. Biases are left out.
All is in float32 at least.

Shapes: `head` query heads of `head_feature` numbers; `feature` of the residual stream.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts.blocks import Block, Parts, Projection
from monitor.parts.norms import LinearNorm, NotANormError, precise

_POST_NORM = "the block norms its stream after every write: nothing of it is read as it was written"


class NotFoldedError(Exception):
    """Why there is no matrix by which a part reads or writes the stream."""


def reading(
    parts: Parts, block: Block, name: Literal["query", "key", "value"]
) -> Float[Tensor, "head feature head_feature"]:
    """The matrices by which heads make queries, keys or values of the residual stream; queries
    and keys before they are rotated by their position.

    Raises `NotFoldedError` where they are not known, or are no matrices.
    """
    projection: Projection | None = getattr(block, name)
    weights = {"query": block.w_q, "key": block.w_k, "value": block.w_v}[name]
    if projection is None or weights is None:
        raise NotFoldedError(_why(block, name))
    if block.stream_norms is not None:
        raise NotFoldedError(_POST_NORM)
    if "attention_norm" in block.reasons:
        raise NotFoldedError(_why(block, "attention_norm"))
    folded = projection.scale * precise(weights)
    if projection.norm is not None and projection.norm_columns is not None:
        folded = _normed_heads(parts, projection.norm, projection.norm_columns, folded, weights)
    if block.attention_norm is None:
        return folded
    return _norm(parts, block.attention_norm, weights[0, :, 0]).read(folded.mT).mT


def writing(parts: Parts, block: Block) -> Float[Tensor, "head head_feature feature"]:
    """The matrices by which heads write their mixed values to the residual stream.

    Raises `NotFoldedError` where they are not known, or are no matrices.
    """
    write, weights = block.attention_write, block.w_o
    if write is None:
        raise NotFoldedError(_why(block, "attention_write"))
    if weights is None:
        raise NotFoldedError(_why(block, "mixing"))
    if block.stream_norms is not None:
        raise NotFoldedError(_POST_NORM)
    folded = write.scale * precise(weights)
    return folded if write.norm is None else _norm(parts, write.norm, weights[0, 0]).written(folded)


def embedded(parts: Parts, ids: Int[Tensor, " token"]) -> Float[Tensor, "token feature"]:
    """What tokens put into the residual stream.

    Raises `NotFoldedError` where that is not known.
    """
    if parts.embedding_map is None:
        raise NotFoldedError(f"embedding: {parts.reasons.get('embedding', 'not found')}")
    rows = parts.embedding_scale * parts.embedding_map.read()[0][ids]
    return precise(parts.apply(parts.embedding_norm, rows))


def unembedded(parts: Parts, ids: Int[Tensor, " token"]) -> Float[Tensor, "token feature"]:
    """What tokens' logits read of what the final norm makes, which `final_norm` folds.

    Raises `NotFoldedError` where that is not known.
    """
    if parts.unembedding_map is None:
        raise NotFoldedError(f"unembedding: {parts.reasons.get('unembedding', 'not found')}")
    return parts.logit_scale * precise(parts.unembedding_map.read()[0][ids])


def final_norm(parts: Parts) -> LinearNorm | None:
    """The norm before the unembedding; None where there is none.

    Raises `NotFoldedError` where it is not known, or is no norm.
    """
    if parts.unembedding_map is None or "final_norm" in parts.reasons:
        name = "unembedding" if parts.unembedding_map is None else "final_norm"
        raise NotFoldedError(f"{name}: {parts.reasons.get(name, 'not found')}")
    if parts.final_norm is None:
        return None
    return _norm(parts, parts.final_norm, parts.unembedding_map.read()[0][0])


def _norm(parts: Parts, path: str, like: Tensor) -> LinearNorm:
    try:
        return LinearNorm.of(lambda rows: parts.apply(path, rows[None])[0], like)
    except NotANormError as error:
        raise NotFoldedError(f"{path}: {error}") from None


def _normed_heads(
    parts: Parts,
    path: str,
    columns: Int[Tensor, "keyhead head_feature"],
    weights: Float[Tensor, "head feature head_feature"],
    like: Tensor,
) -> Float[Tensor, "head feature head_feature"]:
    """The gain of a norm after a projection: of each head's own, or of one over all heads."""
    each = len(weights) // len(columns)
    for size in (columns.shape[1], int(columns.max()) + 1):
        try:
            norm = _norm(parts, path, like.new_zeros(size))
        except RuntimeError:
            continue
        if size > columns.shape[1] and norm.centred:
            raise NotFoldedError(f"{path}: it takes a mean over all heads off each of them")
        inside = (columns % size).to(norm.gain.device)
        ones = norm.gain.new_ones(columns.shape[1])
        whole = LinearNorm(gain=ones, bias=torch.zeros_like(ones), centred=norm.centred)
        return whole.written(weights) * norm.gain[inside].repeat_interleave(each, 0)[:, None]
    raise NotFoldedError(f"{path}: it norms neither single heads nor all of them together")


def _why(block: Block, name: str) -> str:
    return f"{name} of {block.path}: {block.reasons.get(name, 'not found')}"
