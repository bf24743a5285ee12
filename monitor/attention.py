"""What one attention call shows, from its queries and keys, without ever holding the pattern.

With scores s and their log-sum-exp L per query, an attention weight is p = exp(s - L) and the
entropy of a row is L - Σ p·s. Both are exact and need one number per query, which the CPU's
attention kernel computes anyway; with the keys in the place of the values its output is Σ p·k, and
q·(Σ p·k) = Σ p·s. Where that kernel cannot be used (masks, biases, other devices) the scores are
computed for a block of queries at a time.

Shapes: `batch head query key feature`; `group` query heads share one of the `keyhead` heads of the
keys; `pair` is one (query, key) entry of a target.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.stimuli import AttentionTarget, Stimulus

# Scores, or gathered queries and keys, of this size are held at a time.
_BLOCK_BYTES = 32 * 2**20

# A bias this low hides a key: exp of it is 0 in every floating point type.
_HIDDEN = -1e4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerAttention:
    """The attention of one layer on one stimulus, summed over the queries of each sequence.

    `mass` holds, for each of the stimulus's targets, the attention on the target's keys, and
    `uniform` what it would be if every query attended equally to all keys in its view.
    `entropy` sums the entropies in nats over all queries but the first, which sees only itself;
    `normalized_entropy` sums the same divided by the log of the number of keys in view, and
    `uniform_entropy` those logs. The first two are None where the stimulus wants no entropy.
    `causal`: no query sees a later key. `layer` and the attending `module`'s path are known once
    the whole pass was seen.
    """

    mass: Mapping[str, Float[Tensor, "batch head"]]
    uniform: Mapping[str, Float[Tensor, "batch head"]]
    entropy: Float[Tensor, "batch head"] | None
    normalized_entropy: Float[Tensor, "batch head"] | None
    uniform_entropy: Float[Tensor, "batch head"]
    causal: bool
    layer: int = -1
    module: str = ""

    def at(self, layer: int, module: str) -> LayerAttention:
        """The same attention, named."""
        return dataclasses.replace(self, layer=layer, module=module)

    @staticmethod
    def join(parts: Sequence[LayerAttention]) -> LayerAttention:
        """One layer's attention on a batch that was cut into parts."""
        first = parts[0]

        def together(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return LayerAttention(
            mass={name: torch.cat([p.mass[name] for p in parts]) for name in first.mass},
            uniform={name: torch.cat([p.uniform[name] for p in parts]) for name in first.uniform},
            entropy=together("entropy"),
            normalized_entropy=together("normalized_entropy"),
            uniform_entropy=torch.cat([p.uniform_entropy for p in parts]),
            causal=all(part.causal for part in parts),
            layer=first.layer,
            module=first.module,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelfAttention:
    """The arguments of one `scaled_dot_product_attention` over a whole stimulus, made uniform.

    `bias` is added to the scores and hides keys where it is -inf; it is None where `is_causal`
    says it all, or every key is in view. `batched`: the caller kept batch and head apart.
    """

    query: Float[Tensor, "batch head query feature"]
    key: Float[Tensor, "batch keyhead key feature"]
    value: Float[Tensor, "batch keyhead key channel"]
    bias: Float[Tensor, "#batch #head query key"] | None
    is_causal: bool
    scale: float
    batched: bool

    @classmethod
    def of(  # noqa: PLR0917 -- the arguments of scaled_dot_product_attention, as it takes them
        cls,
        shape: Sequence[int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG003 -- what is measured is the attention without it
        is_causal: bool = False,
        scale: float | None = None,
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
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            batched=batched,
        )

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, Tensor | None]:
        """The attention on the stimulus's targets; and the call's own output where that fell out
        on the way.
        """
        log_sum_exp, entropy, output = self._by_kernel(stimulus.entropy) or self._by_blocks(
            stimulus.entropy
        )
        view = self._view()
        log_length = view.row_length.log()
        heads = self.query.shape[:2]

        def summed(rows: Tensor) -> Tensor:
            return rows[..., 1:].sum(-1).expand(heads).cpu()

        attention = LayerAttention(
            mass={k: self._mass(t, log_sum_exp).cpu() for k, t in stimulus.targets.items()},
            uniform={k: view.uniform(t).expand(heads).cpu() for k, t in stimulus.targets.items()},
            entropy=None if entropy is None else summed(entropy),
            normalized_entropy=None
            if entropy is None
            else summed((entropy / log_length).where(log_length > 0, 0.0)),
            uniform_entropy=summed(log_length),
            causal=view.causal,
        )
        return attention, output if output is None or self.batched else output.flatten(0, 1)

    def _by_kernel(self, entropy: bool) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Log-sum-exp, entropy and output from the CPU's kernel; None where it does not apply."""
        kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
        if kernel is None or self.bias is not None or self.query.device.type != "cpu":
            return None
        query, key, value = self.query.float(), self._per_head(self.key).float(), self.value
        own_types = self.query.dtype == torch.float32 and value.shape[-1] == key.shape[-1]
        values = key if entropy or not own_types else self._per_head(value)
        try:
            mixed, log_sum_exp = kernel(query, key, values, 0.0, self.is_causal, scale=self.scale)
        except RuntimeError:
            # The operator is private to torch: what it refuses, the blocks can do.
            return None
        if values is not key:
            return log_sum_exp, None, mixed
        rows = log_sum_exp - self.scale * (query * mixed).sum(-1) if entropy else None
        return log_sum_exp, rows, None

    def _by_blocks(self, entropy: bool) -> tuple[Tensor, Tensor | None, None]:
        """Log-sum-exp and entropy of every row from the scores of a few queries at a time."""
        batch, heads, positions, _ = self.query.shape
        size = max(1, _BLOCK_BYTES // (4 * batch * heads * positions))
        keys = self._per_head(self.key).float().transpose(-1, -2)
        log_sum_exp, entropies = [], []
        for start in range(0, positions, size):
            rows = slice(start, min(start + size, positions))
            scores = self.query[:, :, rows].float() @ keys * self.scale
            if self.bias is not None:
                scores += self.bias[:, :, rows]
            if self.is_causal:
                later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(start + 1)
                scores.masked_fill_(later, -math.inf)
            log_sum_exp.append(scores.logsumexp(-1))
            if entropy:
                weights = _weights(scores, log_sum_exp[-1][..., None])
                surprise = weights * (log_sum_exp[-1][..., None] - scores)
                entropies.append(surprise.where(weights > 0, weights).sum(-1))
        return torch.cat(log_sum_exp, -1), torch.cat(entropies, -1) if entropy else None, None

    def _mass(
        self, target: AttentionTarget, log_sum_exp: Float[Tensor, "batch head query"]
    ) -> Float[Tensor, "batch head"]:
        """The attention on the target's keys, summed over each sequence."""
        heads, keyheads = self.query.shape[1], self.key.shape[1]
        mass = log_sum_exp.new_zeros(log_sum_exp.shape[:2])
        size = max(1, _BLOCK_BYTES // (4 * heads * self.query.shape[-1]))
        for pairs in torch.arange(len(target.query), device=mass.device).split(size):
            sequence, query, key = (t[pairs] for t in (target.sequence, target.query, target.key))
            queries = self.query[sequence, :, query].float().unflatten(1, (keyheads, -1))
            keys = self.key[sequence, :, key].float()
            scores = torch.einsum("pkgf,pkf->pkg", queries, keys).flatten(1) * self.scale
            if self.bias is not None:
                bias = self.bias.expand(len(mass), -1, -1, -1)
                scores += bias[sequence, :, query, key]
            weights = _weights(scores, log_sum_exp[sequence, :, query])
            mass.index_add_(0, sequence, weights)
        return mass

    def _per_head(self, keys: Tensor) -> Tensor:
        """Keys or values once for every query head of their group."""
        return keys.repeat_interleave(self.query.shape[1] // keys.shape[1], dim=1)

    def _view(self) -> _View:
        batch, _, positions, _ = self.query.shape
        if self.bias is not None:
            in_view = self.bias > -math.inf
            if self.is_causal:
                in_view = in_view.tril()
            length = in_view.sum(-1).clamp(min=1)
            causal = not bool(in_view.triu(1).any())
            return _View(batch=batch, in_view=in_view, row_length=length, causal=causal)
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

    def uniform(self, target: AttentionTarget) -> Float[Tensor, "batch #head"]:
        """The mass on the target if every query attended equally to all keys in its view."""
        length = self.row_length.expand(self.batch, -1, -1)[target.sequence, :, target.query]
        weights = 1 / length
        if self.in_view is not None:
            in_view = self.in_view.expand(self.batch, -1, -1, -1)
            weights *= in_view[target.sequence, :, target.query, target.key]
        return weights.new_zeros(self.batch, weights.shape[1]).index_add_(
            0, target.sequence, weights
        )


def _weights(scores: Tensor, log_sum_exp: Tensor) -> Tensor:
    """exp(s - L); no attention at all, and not NaN, in a row whose every key is hidden."""
    return (scores - log_sum_exp).exp().where(log_sum_exp != -math.inf, 0.0)


def _bias(mask: Tensor, positions: int) -> Float[Tensor, "#batch #head query key"]:
    """What a mask adds to the scores: -inf where it hides a key, else its own value, if any."""
    mask = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, positions, positions)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask.float().masked_fill(mask <= _HIDDEN, -math.inf)


def _only_causal(bias: Float[Tensor, "#batch #head query key"]) -> bool:
    """Whether a bias does no more than to hide later keys."""
    earlier = torch.ones_like(bias[0, 0], dtype=torch.bool).tril()
    return bool(((bias == 0) & earlier | (bias == -math.inf) & ~earlier).all())
