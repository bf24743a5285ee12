"""Models with heads ablated, built the slow and obvious way, in float64.

`batch` sequences of `position` token ids; a head is (layer, head).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import AttentionOnly

Head = tuple[int, int]


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """The cross-entropy of every token but the first."""
    with torch.no_grad():
        logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    return torch.stack(
        [
            F.cross_entropy(row[:-1], ids[1:], reduction="none")
            for row, ids in zip(logits, tokens, strict=True)
        ]
    )


def without(
    model: nn.Module,
    heads: Collection[Head],
    *,
    size: int,
    outputs: Callable[[nn.Module, int], Tensor],
) -> nn.Module:
    """A copy in which what the heads write is multiplied by zero. `outputs` gives a layer's output
    matrix [head · feature, written], of which each head has `size` rows.
    """
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in heads:
            outputs(silenced, layer)[head * size : (head + 1) * size] = 0
    return silenced


def attention_only(
    model: AttentionOnly,
    tokens: Tensor,
    heads: Collection[Head],
    by: str,
    *,
    patterns_kept: bool = False,
) -> Tensor:
    """The losses of an `AttentionOnly`, head by head with the whole softmax."""
    model = copy.deepcopy(model).double()
    kept: dict[Head, Tensor] = {}
    means: dict[Head, Tensor] = {}

    def run(ablated: Collection[Head]) -> Tensor:
        residual = model.token(tokens) + model.position(torch.arange(tokens.shape[1]))
        for layer, block in enumerate(model.blocks):
            written = torch.zeros_like(residual)
            for head, (query, key, value) in enumerate(
                zip(*(part.unbind(1) for part in block.projected(residual)), strict=True)
            ):
                scores = query @ key.mT / query.shape[-1] ** 0.5
                later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
                pattern = scores.masked_fill(later, -torch.inf).softmax(-1)
                if not ablated:
                    kept[layer, head] = pattern
                elif patterns_kept:
                    pattern = kept[layer, head]
                mixed = pattern @ value
                if not ablated:
                    means[layer, head] = mixed.mean((0, 1))
                if (layer, head) in ablated:
                    mixed = (means[layer, head] if by == "mean" else 0.0) + 0.0 * mixed
                size = mixed.shape[-1]
                written += mixed @ block.output.weight[:, head * size : (head + 1) * size].T
            residual = residual + written
        return model.unembedding(model.norm(residual))

    with torch.no_grad():
        intact = run(())
        logits = run(heads) if heads else intact
    return losses(lambda _: logits, tokens)
