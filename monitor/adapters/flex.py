"""Attention by torch.nn.attention.flex_attention: scores that the model's own functions change."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.attention import LayerAttention
from monitor.attention.rows import Rows, attended, reduce_rows
from monitor.stimuli import Stimulus


def read(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int]
) -> FlexAttention | None:
    """The attention that the operator behind `flex_attention` is about to compute."""
    if getattr(function, "__name__", None) != "flex_attention":
        return None
    call = FlexAttention.of(*args, **kwargs)
    batch, _, positions, _ = call.query.shape
    return call if (batch, positions, call.key.shape[2]) == (*shape, positions) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlexAttention:
    """One call of the operator: `score_mod` changes each score and `mask_mod` hides keys, both
    from the indices of sequence, head, query and key.
    """

    query: Float[Tensor, "batch head query feature"]
    key: Float[Tensor, "keybatch keyhead key feature"]
    value: Float[Tensor, "keybatch keyhead key channel"]
    score_mod: Callable[..., Tensor]
    mask_mod: Callable[..., Tensor]
    scale: float
    score_buffers: tuple[Any, ...]
    mask_buffers: tuple[Any, ...]

    @classmethod
    def of(  # noqa: PLR0917 -- the arguments of the operator, as it takes them
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Callable[..., Tensor],
        block_mask: tuple[Any, ...],
        scale: float,
        kernel_options: Any,  # noqa: ARG003 -- how fast, not what
        score_mod_other_buffers: tuple[Any, ...] = (),
        mask_mod_other_buffers: tuple[Any, ...] = (),
    ) -> FlexAttention:
        """The call with these arguments."""
        return cls(
            query=query,
            key=key,
            value=value,
            score_mod=score_mod,
            mask_mod=block_mask[-1],
            scale=scale,
            score_buffers=score_mod_other_buffers,
            mask_buffers=mask_mod_other_buffers,
        )

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, tuple[Tensor, Tensor, Tensor]]:
        """The attention on the stimulus's targets; and what the operator returns: the mixed values,
        and the log-sum-exp and the largest of every row's scores over log 2.

        The model's own way there, without its compiled kernel, would hold the whole pattern.
        """
        keys, values = self._per_head(self.key), self._per_head(self.value).to(self.query.dtype)
        mixed, log_sum_exp, largest = [], [], []

        def rows(block: slice) -> Rows:
            scores = self._scores(keys, block)
            weights, in_view, top = attended(scores, scores != -math.inf)
            mixed.append(weights.to(values.dtype) @ values)
            log_sum_exp.append(scores.logsumexp(-1) / math.log(2))
            largest.append(top / math.log(2))
            return weights, in_view, top

        attention = reduce_rows(rows, stimulus, heads=self.query.shape[1])
        return attention, (torch.cat(mixed, 2), torch.cat(log_sum_exp, 2), torch.cat(largest, 2))

    def _scores(
        self, keys: Float[Tensor, "batch head key feature"], block: slice
    ) -> Float[Tensor, "batch head row key"]:
        """The changed and masked scores of a block of queries."""
        # Private to torch, as is all that knows how to apply these functions to indices.
        from torch._higher_order_ops.flex_attention import _math_attention_inner

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, *more: Any) -> Tensor:
            return self.score_mod(score, b, h, q + block.start, *more)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, *more: Any) -> Tensor:
            return self.mask_mod(b, h, q + block.start, *more)

        _, scores = _math_attention_inner(
            self.query[:, :, block],
            keys,
            keys,
            score_mod,
            (mask_mod,),
            self.scale,
            {},
            self.score_buffers,
            self.mask_buffers,
        )
        return scores.float()

    def _per_head(self, keys: Tensor) -> Tensor:
        """Keys or values once for every sequence, and for every query head of their group."""
        batch, heads = self.query.shape[:2]
        keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
        return keys.expand(batch, -1, -1, -1)
