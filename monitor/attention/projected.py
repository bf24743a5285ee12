"""Attention from its queries and keys, without ever holding the pattern.

With scores s and their log-sum-exp L per query, an attention weight is p = exp(s - L) and the
entropy of a row is L - Σ p·s. Both are exact and need one number per query, which attention kernels
compute anyway; with the keys in the place of the values a kernel's output is Σ p·k, and
q·(Σ p·k) = Σ p·s. Where scores carry a finite bias of their own, or no kernel applies, the rows of
a block of queries are computed at a time.

Shapes: `batch head query key feature`; `group` query heads share one of the `keyhead` heads of the
keys; `pair` is one (query, key) entry of a target.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.attention.kernels import log_sum_exp
from monitor.attention.layer import LayerAttention
from monitor.attention.rows import (
    BLOCK_BYTES,
    HIDDEN,
    Offsets,
    Rows,
    attended,
    largest_seen,
    reduce_rows,
)
from monitor.stimuli import AttentionTarget, Stimulus

# In how many rows the largest score is sought: it is below the true one by less than the log of the
# keys in view, and true where attention is sharp, which is where scores are large.
_ROWS_SOUGHT = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelfAttention:
    """Scaled dot-product attention over a whole stimulus, from queries and keys as the scores take
    them: after rotation and normalisation.

    `bias` is added to the scores and hides keys where it is -inf; `is_causal` hides later keys;
    `scale` is 1/√feature by default. `value` is needed only for what the model itself goes on with;
    `batched`: the caller kept batch and head apart.
    """

    query: Float[Tensor, "batch head query feature"]
    key: Float[Tensor, "batch keyhead key feature"]
    value: Float[Tensor, "batch keyhead key channel"] | None = None
    bias: Float[Tensor, "#batch #head query key"] | None = None
    is_causal: bool = False
    scale: float | None = None
    batched: bool = True

    @classmethod
    def of(  # noqa: PLR0917 -- the arguments of scaled_dot_product_attention, as it takes them
        cls,
        shape: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: Any = 0.0,  # noqa: ARG003 -- what is measured is the attention without it
        is_causal: bool = False,
        scale: Any = None,
        enable_gqa: bool = False,  # noqa: ARG003 -- fewer heads of keys than queries say it too
    ) -> SelfAttention | None:
        """The call of `scaled_dot_product_attention` with these arguments, or None where it is not
        self-attention over tokens of `shape` [batch, position].
        """
        batch, positions = shape
        if query.shape[-2] != positions or key.shape[-2] != positions:
            return None
        batched = query.ndim == 4
        if query.ndim == 3 and len(query) % batch == 0:
            if attn_mask is not None and attn_mask.ndim == 3:
                attn_mask = attn_mask.expand(len(query), -1, -1).unflatten(0, (batch, -1))
            query, key, value = (t.unflatten(0, (batch, -1)) for t in (query, key, value))
        if query.ndim != 4 or len(query) != batch:
            return None
        bias = None if attn_mask is None else _bias(attn_mask, positions)
        if bias is not None and _only_causal(bias):
            bias, is_causal = None, True
        return cls(
            query=query,
            key=key,
            value=value,
            bias=bias,
            is_causal=is_causal,
            scale=None if scale is None else float(scale),
            batched=batched,
        )

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, Tensor | None]:
        """The attention on the stimulus's targets; and the call's own output where that fell out
        on the way.
        """
        keys = self._per_head(self.key).float()
        return self._by_kernel(keys, stimulus) or (
            reduce_rows(functools.partial(self._rows, keys), stimulus, heads=self.query.shape[1]),
            None,
        )

    def _by_kernel(
        self, keys: Float[Tensor, "batch head key feature"], stimulus: Stimulus
    ) -> tuple[LayerAttention, Tensor | None] | None:
        """The same from a kernel's log-sum-exp; None where none applies."""
        if self.bias is not None and (self.is_causal or not _only_hides(self.bias)):
            return None
        query = self.query.float()
        values, serves = keys, False
        if not stimulus.entropy and self.value is not None:
            # The kernel's output serves the model itself where it has the model's type and shape;
            # in rows whose every key is hidden by finite numbers the model gives something.
            plain = self.bias is None and self.query.dtype == torch.float32
            serves = plain and self.value.shape[-1] == keys.shape[-1]
            values = self._per_head(self.value) if serves else keys
        found = log_sum_exp(
            query, keys, values, bias=self.bias, is_causal=self.is_causal, scale=self._scale
        )
        if found is None:
            return None
        mixed, normalizer = found
        view = self._view()
        log_length = view.row_length.clamp(min=1).log()
        heads = query.shape[:2]

        def summed(rows: Tensor) -> Tensor:
            return rows[..., 1:].sum(-1).expand(heads).cpu()

        entropy = normalized = largest = None
        if stimulus.entropy:
            largest = self._largest(keys, normalizer.where(view.row_length > 0, -math.inf)).cpu()
            rows = normalizer - self._scale * (query * mixed).sum(-1)
            # A row whose every key is hidden shows nothing.
            rows = rows.where(view.row_length > 0, 0.0)
            entropy = summed(rows)
            normalized = summed((rows / log_length).where(log_length > 0, 0.0))
        mass, uniform = {}, {}
        for name, target in stimulus.targets.items():
            mass[name] = self._mass(target, keys, normalizer, view).cpu()
            uniform[name] = view.uniform(target).expand(heads).cpu()
        offsets = None if stimulus.sampled is None else self._offsets(keys, stimulus)
        attention = LayerAttention(
            mass=mass,
            uniform=uniform,
            entropy=entropy,
            normalized_entropy=normalized,
            uniform_entropy=summed(log_length),
            causal=view.causal,
            largest_logit=largest,
            offsets=None if offsets is None else offsets.attended,
            uniform_offsets=None if offsets is None else offsets.uniform,
        )
        if serves:
            return attention, mixed if self.batched else mixed.flatten(0, 1)
        return attention, None

    def _rows(self, keys: Float[Tensor, "batch head key feature"], block: slice) -> Rows:
        """The attention of a block of queries."""
        scores = self.query[:, :, block].float() @ keys.transpose(-1, -2) * self._scale
        in_view = torch.ones_like(scores[:1, :1], dtype=torch.bool)
        if self.is_causal:
            in_view = in_view.tril(block.start)
        if self.bias is not None:
            scores += self.bias[:, :, block]
            in_view = in_view & (self.bias[:, :, block] > -math.inf)
        return attended(scores, in_view)

    def _offsets(
        self, keys: Float[Tensor, "batch head key feature"], stimulus: Stimulus
    ) -> Offsets:
        """How far back is attended, from the rows of the sampled queries."""
        offsets = Offsets.none(stimulus, keys.shape[1])
        batch, samples = offsets.sampled.shape
        weights, in_view, _ = self._rows_at(
            keys, offsets.sampled[:, None].expand(-1, keys.shape[1], -1)
        )
        each = torch.arange(batch, device=keys.device)[:, None].expand(-1, samples)
        offsets.add_rows(
            each.flatten(),
            offsets.sampled.flatten(),
            weights.transpose(1, 2).flatten(0, 1),
            in_view.expand_as(weights).transpose(1, 2).flatten(0, 1),
        )
        return offsets

    def _largest(
        self,
        keys: Float[Tensor, "batch head key feature"],
        normalizer: Float[Tensor, "batch head query"],
    ) -> Float[Tensor, "batch head"]:
        """The largest score of the rows whose log-sum-exp, which bounds it, is largest."""
        at = normalizer.topk(min(_ROWS_SOUGHT, normalizer.shape[-1])).indices
        _, _, scores = self._rows_at(keys, at)
        return largest_seen(scores)

    def _rows_at(
        self,
        keys: Float[Tensor, "batch head key feature"],
        at: Int[Tensor, "batch head row"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attention of some queries of each head."""
        each = at[..., None]
        query = self.query.gather(2, each.expand(-1, -1, -1, keys.shape[-1])).float()
        # The model may be in an autocast region of its own.
        with torch.autocast(keys.device.type, enabled=False):
            scores = query @ keys.transpose(-1, -2) * self._scale
        in_view = torch.ones_like(scores, dtype=torch.bool)
        if self.is_causal:
            in_view = torch.arange(keys.shape[2], device=keys.device) <= each
        if self.bias is not None:
            bias = self.bias.expand(*at.shape[:2], -1, -1)
            in_view = in_view & (bias.gather(2, each.expand_as(scores)) > -math.inf)
        return attended(scores, in_view)

    def _mass(
        self,
        target: AttentionTarget,
        keys: Float[Tensor, "batch head key feature"],
        normalizer: Float[Tensor, "batch head query"],
        view: _View,
    ) -> Float[Tensor, "batch head"]:
        """The attention on the target's keys, summed over each sequence."""
        mass = normalizer.new_zeros(normalizer.shape[:2])
        size = max(1, BLOCK_BYTES // (4 * keys.shape[1] * keys.shape[-1]))
        for pairs in torch.arange(len(target.query), device=mass.device).split(size):
            sequence, query, key = (t[pairs] for t in (target.sequence, target.query, target.key))
            queries, attended = self.query[sequence, :, query].float(), keys[sequence, :, key]
            scores = torch.einsum("phf,phf->ph", queries, attended) * self._scale
            weights = (scores - normalizer[sequence, :, query]).exp()
            mass.index_add_(0, sequence, view.kept(weights, sequence, query, key))
        return mass

    @property
    def _scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    def _per_head(self, keys: Tensor) -> Tensor:
        """Keys or values once for every query head of their group."""
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[1], dim=1)

    def _view(self) -> _View:
        batch, _, positions, _ = self.query.shape
        if self.bias is not None:
            in_view = self.bias > -math.inf
            causal = not bool(in_view.triu(1).any())
            return _View(batch=batch, in_view=in_view, row_length=in_view.sum(-1), causal=causal)
        length = torch.full((1, 1, positions), positions, device=self.query.device)
        if self.is_causal:
            length = torch.arange(1, positions + 1, device=length.device).view(1, 1, -1)
        return _View(batch=batch, in_view=None, row_length=length, causal=self.is_causal)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _View:
    """Which keys each query may see, and how many; `in_view` is None where length says it all."""

    batch: int
    in_view: Bool[Tensor, "#batch #head query key"] | None
    row_length: Int[Tensor, "#batch #head query"]
    causal: bool

    def kept(
        self,
        weights: Float[Tensor, "pair head"],
        sequence: Int[Tensor, " pair"],
        query: Int[Tensor, " pair"],
        key: Int[Tensor, " pair"],
    ) -> Float[Tensor, "pair head"]:
        """The weights, 0 where the key is out of the query's view."""
        if self.in_view is None:
            return weights
        in_view = self.in_view.expand(self.batch, -1, -1, -1)[sequence, :, query, key]
        return weights.where(in_view, 0.0)

    def uniform(self, target: AttentionTarget) -> Float[Tensor, "batch #head"]:
        """The mass on the target if every query attended equally to all keys in its view."""
        pairs = (target.sequence, target.query, target.key)
        length = self.row_length.expand(self.batch, -1, -1)[target.sequence, :, target.query]
        weights = self.kept(1 / length.clamp(min=1), *pairs)
        return weights.new_zeros(self.batch, weights.shape[1]).index_add_(
            0, target.sequence, weights
        )


def _bias(mask: Tensor, positions: int) -> Float[Tensor, "#batch #head query key"]:
    """What a mask adds to the scores: -inf where it hides a key, else its own value, if any."""
    mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, positions, positions)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask.float().masked_fill(mask <= HIDDEN, -math.inf)


def _only_hides(bias: Float[Tensor, "#batch #head query key"]) -> bool:
    """Whether a bias leaves the scores as they are wherever it hides no key."""
    return bool(((bias == 0) | (bias == -math.inf)).all())


def _only_causal(bias: Float[Tensor, "#batch #head query key"]) -> bool:
    """Whether a bias does no more than to hide later keys."""
    earlier = torch.ones_like(bias[0, 0], dtype=torch.bool).tril()
    return bool(((bias == 0) & earlier | (bias == -math.inf) & ~earlier).all())
