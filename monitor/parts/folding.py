"""The matrices with which heads read the residual stream and write it, norms included.

Whatever reads the stream through a norm reads a multiple of x C diag(γ) W of the stream x: C takes
the mean off where the norm does, γ is its gain, and the multiple is one positive number a position.
So C diag(γ) W is the matrix, up to scale, by which it reads; what a norm makes of what is written,
and the final norm before the unembedding, are folded likewise. Biases are left out.
All is in float32 at least.

Shapes: `head` query heads of `head_feature` numbers; `feature` of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts.blocks import Block, Parts, Projection

# Beside numbers of this size the small one that norms add to a variance is less than the rounding.
_LARGE, _ROUNDING = 16.0, 1e-6
_SEED = 2
_POST_NORM = "the block norms its stream after every write: nothing of it is read as it was written"


class NotFoldedError(Exception):
    """Why there is no matrix by which a part reads or writes the stream."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gain:
    """A norm, but for its bias and the positive number by which it divides each position: what is
    left is linear.
    """

    weight: Float[Tensor, " feature"]
    centred: bool

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], like: Float[Tensor, " feature"]) -> Gain:
        """Reads it off what `norm` makes of tensors of the size, kind and place of `like`.

        Raises `NotFoldedError` where it is no norm, and what `norm` raises.
        """
        random = torch.Generator().manual_seed(_SEED)
        drawn = _LARGE * (1 + torch.randn(4, len(like), generator=random)).to(like)
        signs = _LARGE * torch.ones_like(like)
        signs[1::2] *= -1
        made = norm(torch.stack([*drawn, *(2 * drawn), drawn[0] + 2 * _LARGE, signs, -signs]))
        eps = torch.finfo(like.dtype).eps
        centred = _close(made[8], made[0], eps)
        up, down = _precise(made[-2:])
        weight = (up - down) / 2 / _normed(_precise(signs), centred=centred)
        expected = weight * _normed(_precise(drawn), centred=centred) + (up + down) / 2
        if not (_close(made[:4], expected, eps) and _close(made[4:8], expected, eps)):
            raise NotFoldedError("what reads the stream does so through something that is no norm")
        return cls(weight=weight, centred=centred)

    def written(self, rows: Float[Tensor, "*shape feature"]) -> Float[Tensor, "*shape feature"]:
        """What of rows that it reads it passes on."""
        return _mean_taken_off(rows, -1, take=self.centred) * self.weight

    def read(
        self, columns: Float[Tensor, "*shape feature column"]
    ) -> Float[Tensor, "*shape feature column"]:
        """The matrix by which it is read what `columns` reads of what it makes."""
        return _mean_taken_off(columns * self.weight[:, None], -2, take=self.centred)


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
    folded = projection.scale * _precise(weights)
    if projection.norm is not None and projection.norm_columns is not None:
        folded = _normed_heads(parts, projection.norm, projection.norm_columns, folded, weights)
    gain = _gain(parts, block.attention_norm, weights[0, :, 0])
    return folded if gain is None else gain.read(folded)


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
    gain = _gain(parts, write.norm, weights[0, 0])
    folded = write.scale * _precise(weights)
    return folded if gain is None else gain.written(folded)


def embedded(parts: Parts, ids: Int[Tensor, " token"]) -> Float[Tensor, "token feature"]:
    """What tokens put into the residual stream.

    Raises `NotFoldedError` where that is not known.
    """
    if parts.embedding_map is None:
        raise NotFoldedError(f"embedding: {parts.reasons.get('embedding', 'not found')}")
    rows = parts.embedding_scale * parts.embedding_map.read()[0][ids]
    return _precise(parts.apply(parts.embedding_norm, rows))


def unembedded(parts: Parts, ids: Int[Tensor, " token"]) -> Float[Tensor, "token feature"]:
    """What tokens' logits read of what the final norm makes, which `final_gain` folds.

    Raises `NotFoldedError` where that is not known.
    """
    if parts.unembedding_map is None:
        raise NotFoldedError(f"unembedding: {parts.reasons.get('unembedding', 'not found')}")
    return parts.logit_scale * _precise(parts.unembedding_map.read()[0][ids])


def final_gain(parts: Parts) -> Gain | None:
    """The norm before the unembedding; None where there is none.

    Raises `NotFoldedError` where it is not known, or is no norm.
    """
    if parts.unembedding_map is None or "final_norm" in parts.reasons:
        name = "unembedding" if parts.unembedding_map is None else "final_norm"
        raise NotFoldedError(f"{name}: {parts.reasons.get(name, 'not found')}")
    return _gain(parts, parts.final_norm, parts.unembedding_map.read()[0][0])


def _gain(parts: Parts, path: str | None, like: Tensor) -> Gain | None:
    if path is None:
        return None
    try:
        return Gain.of(lambda rows: parts.apply(path, rows[None])[0], like)
    except NotFoldedError as error:
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
            gain = Gain.of(lambda rows: parts.apply(path, rows[None])[0], like.new_zeros(size))
        except RuntimeError:
            continue
        if size > columns.shape[1] and gain.centred:
            raise NotFoldedError(f"{path}: it takes a mean over all heads off each of them")
        inside = (columns % size).to(gain.weight.device)
        whole = Gain(weight=gain.weight.new_ones(columns.shape[1]), centred=gain.centred)
        return whole.written(weights) * gain.weight[inside].repeat_interleave(each, 0)[:, None]
    raise NotFoldedError(f"{path}: it norms neither single heads nor all of them together")


def _why(block: Block, name: str) -> str:
    return f"{name} of {block.path}: {block.reasons.get(name, 'not found')}"


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean_taken_off(tensor: Tensor, axis: int, *, take: bool) -> Tensor:
    return tensor - tensor.mean(axis, keepdim=True) if take else tensor


def _normed(rows: Tensor, *, centred: bool) -> Tensor:
    rows = _mean_taken_off(rows, -1, take=centred)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def _close(one: Tensor, other: Tensor, eps: float) -> bool:
    apart = float((one.double() - other.double()).abs().max())
    return apart <= max(8 * eps, _ROUNDING) * float(other.abs().max())
