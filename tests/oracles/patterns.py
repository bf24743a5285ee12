"""Whole attention patterns of the models in `tests.models`, in float64, from models of their own.

Each is computed by a copy of the model in which attention is written out: Hugging Face's eager
implementation, torch's own weights, or the scores as this file has them. Nothing here knows of
`monitor`. The copy's logits come along: where they are the model's, so are the patterns.

Shapes: `batch head query key`; one pattern for each attending layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """The logits, each layer's pattern, and which keys its queries may see ([#head query key])."""

    logits: Tensor
    weights: list[Tensor]
    visible: list[Tensor]


def in_view(positions: int, window: int | None = None) -> Tensor:
    """No later key, and of a window only the last keys."""
    position = torch.arange(positions)
    back = position[:, None] - position
    return ((back >= 0) & (back < (window or positions)))[None]


def of_hugging_face(
    model: nn.Module, eager: nn.Module, tokens: Tensor, windows: Sequence[int | None]
) -> Shown:
    """From `eager`, a model of the same configuration."""
    eager = _copy_of(eager)
    eager.load_state_dict(model.state_dict())
    # The grouped product of its experts is not for float64.
    eager.config._experts_implementation = "eager"
    with torch.no_grad():
        output = eager(tokens, output_attentions=True, use_cache=False)
    visible = [in_view(tokens.shape[1], window) for window in windows]
    for weights, seen in zip(output.attentions, visible, strict=True):
        assert not weights[..., ~seen[0]].any(), "the model sees keys that it was said not to see"
    weights = [layer.double() for layer in output.attentions]
    return Shown(logits=output.logits, weights=weights, visible=visible)


def of_torch(model: nn.Module, tokens: Tensor) -> Shown:
    """From the weights that `nn.MultiheadAttention` gives when asked for those of every head."""
    model = _copy_of(model)
    hidden = ~in_view(tokens.shape[1])[0]
    patterns = []

    def attend(attention: nn.MultiheadAttention, residual: Tensor) -> Tensor:
        three = (residual, residual, residual)
        mixed, weights = attention(*three, attn_mask=hidden, average_attn_weights=False)
        patterns.append(weights)
        return mixed

    with torch.no_grad():
        residual = model.embed(tokens)
        for layer in getattr(model.layers, "layers", model.layers):
            if isinstance(layer, nn.MultiheadAttention):
                residual = residual + attend(layer, residual)
            elif layer.norm_first:
                residual = residual + attend(layer.self_attn, layer.norm1(residual))
                residual = residual + layer._ff_block(layer.norm2(residual))
            else:
                residual = layer.norm1(residual + attend(layer.self_attn, residual))
                residual = layer.norm2(residual + layer._ff_block(residual))
        logits = model.unembed(residual)
    visible = [~hidden[None]] * len(patterns)
    return Shown(logits=logits, weights=patterns, visible=visible)


Scores = Callable[[Tensor, Tensor], Tensor]


def of_hand_built(model: nn.Module, tokens: Tensor, scores: Scores) -> Shown:
    """From a copy whose attention blocks take the softmax of `scores(query, key)`."""
    model, kept = _copy_of(model), _Kept(scores)
    for block in model.blocks:
        if hasattr(block, "attend"):
            block.attend = kept.attend
    return kept.run(model, tokens)


def of_nanogpt(model: nn.Module, tokens: Tensor) -> Shown:
    """From what the written-out branch of a copy hands to the dropout of its attention."""
    model, patterns = _copy_of(model), []
    for block in model.transformer["h"]:
        if block.attn.flash:
            block.attn.flash = False
            block.attn.bias = in_view(tokens.shape[1])[None].double()
        block.attn.attn_dropout.register_forward_hook(lambda *seen: patterns.append(seen[2]))
    with torch.no_grad():
        logits, _ = model(tokens, targets=tokens)
    visible = [in_view(tokens.shape[1])] * len(patterns)
    return Shown(logits=logits, weights=patterns, visible=visible)


def of_litgpt(model: nn.Module, tokens: Tensor) -> Shown:
    """From a copy whose function in the place of torch's is written out here once more."""
    model = _copy_of(model)
    config = model.transformer["h"][0].attn.config

    def scores(query: Tensor, key: Tensor) -> Tensor:
        scaled = query @ key.mT / math.sqrt(config.attention_scores_scalar or config.head_size)
        if cap := config.attention_logit_softcapping:
            scaled = cap * torch.tanh(scaled / cap)
        hidden = ~in_view(tokens.shape[1], config.sliding_window_size)
        return scaled.masked_fill(hidden, -math.inf)

    kept = _Kept(scores)
    for block in model.transformer["h"]:
        block.attn.scaled_dot_product_attention = lambda q, k, v, mask: kept.attend(
            q, k, v
        ).transpose(1, 2)
    return kept.run(model, tokens)


def causal(query: Tensor, key: Tensor) -> Tensor:
    """The scores of causal attention."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    return scores.masked_fill(~in_view(query.shape[-2]), -math.inf)


def changed(mask: Callable, change: Callable | None) -> Scores:
    """The scores that FlexAttention has with a mask and a change of the scores."""

    def scores(query: Tensor, key: Tensor) -> Tensor:
        every = [torch.arange(n) for n in (*query.shape[:3], key.shape[2])]
        at = torch.meshgrid(*every, indexing="ij")
        plain = query @ key.mT / math.sqrt(query.shape[-1])
        return (change(plain, *at) if change else plain).masked_fill(~mask(*at), -math.inf)

    return scores


class _Kept:
    """Attention by the softmax of the scores, whose patterns are kept."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self.weights: list[Tensor] = []
        self.visible: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = self.scores(query, key)
        self.visible.append((scores > -math.inf)[0])
        self.weights.append(scores.softmax(-1))
        return self.weights[-1] @ value

    def run(self, model: nn.Module, tokens: Tensor) -> Shown:
        with torch.no_grad():
            logits = model(tokens)
        return Shown(logits=logits, weights=self.weights, visible=self.visible)


def _copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double().eval()
