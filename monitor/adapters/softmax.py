"""Attention written out: a softmax over whole rows of scores, as eager models have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monitor.attention import Scores
from monitor.attention.rows import HIDDEN

# As torch has it, whatever stands under its name while attention is watched.
FUNCTION = F.softmax

_FUNCTIONS = (FUNCTION, torch.softmax, torch.special.softmax, Tensor.softmax)


def read(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int]
) -> Scores | None:
    """The attention whose scores [batch, head, query, key] a softmax over keys is taken of.

    Batch and head may be one dimension. Softmaxes over anything else are none of ours: without
    heads a gate, or logits, can have the same shape, and only causal scores are taken for ours.
    """
    if function not in _FUNCTIONS:
        return None
    batch, positions = shape
    scores, dim = _arguments(*args, **kwargs)
    last = dim in (-1, scores.ndim - 1)
    if not last or scores.shape[-2:] != (positions, positions) or not scores.is_floating_point():
        return None
    if scores.ndim == 3 and len(scores) % batch == 0:
        if len(scores) == batch and not bool((scores[:, :-1, -1] <= HIDDEN).all()):
            return None
        scores = scores.unflatten(0, (batch, -1))
    return Scores(scores=scores) if scores.ndim == 4 and len(scores) == batch else None


def _arguments(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> tuple[Tensor, Any]:  # noqa: A002 -- the functions' own name for it
    return input, dim
