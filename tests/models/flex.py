"""Attention by FlexAttention: a mask, and a change of the scores, as functions of positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from tests.models.hugging_face import WINDOW

with warnings.catch_warnings():
    # Of torch itself, on importing its compiler.
    warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Nothing is compiled before the first call.
    _compiled = torch.compile(flex_attention)

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend_flexibly(mask: Mask, change: Change | None = None) -> Callable[..., Tensor]:
    """Attention of queries, keys and values; compiled by its caller, as the manual has it."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        positions = query.shape[-2]
        blocks = create_block_mask(mask, None, None, positions, positions, device=query.device)
        return _compiled(query, key, value, score_mod=change, block_mask=blocks)

    return attend


def causal(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def in_a_window(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query >= key) & (query - key < WINDOW)


def linear_biases(
    score: Tensor, sequence: Tensor, head: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    return score - 0.25 * (head + 1) * (query - key)


def soft_cap(score: Tensor, sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return 2 * torch.tanh(score / 2)
