"""Running a model with some of its attention heads ablated.

Shapes: `batch` sequences of `position` token ids; `prediction` one position less; `head` query
heads of one layer, each with `head_feature` mixed values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts import Parts, Site, watch
from monitor.stimuli import Stimulus

# Logits of this size are held at a time.
_LOGIT_BYTES = 32 * 2**20

MeanValues = Mapping[int, Float[Tensor, "head head_feature"]]
"""By layer, what each head mixes on average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Which `heads`, as (layer, head), mix other values than they would: none (`zero`), or their
    mean over all positions of the stimulus (`mean`).

    With `patterns_kept` every head of the model attends as if nothing had been ablated, so that
    only what flows through values is lost (the pattern-preserving ablation of Olsson et al. 2022).
    """

    heads: tuple[tuple[int, int], ...]
    by: Literal["zero", "mean"]
    patterns_kept: bool = False

    @property
    def passes(self) -> int:
        """How many forward passes it takes."""
        return 2 if self.patterns_kept else 1


Stage = tuple[Ablation, ...]
"""Ablations that say something only together: all of them are made, or none."""


def why_not(parts: Parts) -> str | None:
    """Why the heads of a model cannot be ablated, or None."""
    if "blocks" in parts.reasons:
        return f"blocks: {parts.reasons['blocks']}"
    for block in parts.blocks:
        if "mixed" not in block.taps:
            return f"{block.path}: {block.reasons.get('mixing', 'its attention was not seen')}"
    if parts.unembedding_map is None or "unembedding_input" not in parts.taps:
        return f"unembedding: {parts.reasons.get('unembedding', 'not found')}"
    return None


def mean_values(
    parts: Parts, stimulus: Stimulus
) -> dict[int, Float[Tensor, "batch head head_feature"]]:
    """What each head mixes in each sequence, on average over positions: by layer, on the CPU."""
    means: dict[int, Tensor] = {}

    def keep(_site: Site, layer: int, mixed: Tensor) -> None:
        means[layer] = mixed.float().mean(2).cpu()

    watch(parts, stimulus.tokens, keep, sites=["mixed"])
    return means


def ablated_losses(
    parts: Parts, stimulus: Stimulus, ablation: Ablation, means: MeanValues
) -> Float[Tensor, "batch prediction"]:
    """The loss of each next token, in nats, with heads ablated; only `mean` needs the `means`.

    Raises `ValueError` where the model has no such heads.
    """
    tokens, intact = stimulus.tokens.to(parts.model.device), 0
    sites: list[Site] = ["mixed", "unembedding_input"]
    layers = {layer for layer, _ in ablation.heads} | {-1}
    if ablation.patterns_kept:
        # The same sequences twice: the second half attends as the first, which is left intact.
        intact = len(tokens)
        tokens = torch.cat([tokens, tokens])
        sites += ["query", "key", "pattern"]
        layers |= set(range(len(parts.blocks)))
    losses: list[Tensor] = []

    def exchange(site: Site, layer: int, tensor: Tensor) -> Tensor | None:
        if site == "unembedding_input":
            losses.append(_losses(parts, tensor[intact:], tokens[intact:]))
            return None
        if site != "mixed":
            return torch.cat([tensor[:intact], tensor[:intact]])
        heads = [head for at, head in ablation.heads if at == layer]
        if not heads:
            return None
        if max(heads) >= tensor.shape[1]:
            raise ValueError(f"layer {layer} has {tensor.shape[1]} heads, and no head {max(heads)}")
        changed = tensor.clone()
        changed[intact:, heads] = 0.0
        if ablation.by == "mean":
            changed[intact:, heads] += means[layer][heads].to(tensor)[:, None]
        return changed

    if max(layers) >= len(parts.blocks):
        raise ValueError(f"the model has {len(parts.blocks)} blocks, and no layer {max(layers)}")
    watch(parts, tokens, exchange, sites=sites, layers=layers)
    if not losses:
        raise ValueError("what the unembedding reads was not seen")
    return losses[0]


def _losses(
    parts: Parts,
    hidden: Float[Tensor, "batch position feature"],
    tokens: Int[Tensor, "batch position"],
) -> Float[Tensor, "batch prediction"]:
    rows = max(1, _LOGIT_BYTES // (4 * parts.model.width))
    chunks = zip(
        hidden[:, :-1].flatten(0, 1).split(rows), tokens[:, 1:].flatten().split(rows), strict=True
    )
    losses = [
        F.cross_entropy(parts.unembed(some).float(), targets, reduction="none")
        for some, targets in chunks
    ]
    return torch.cat(losses).view(len(tokens), -1).cpu()
