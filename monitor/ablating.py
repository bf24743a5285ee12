"""Running a model with some of its attention heads ablated.

A head's mixed values, what its attention makes of the values, are exchanged while they pass: what
the head writes is a matrix of its own times these, so that zeroing them is zeroing that matrix.

Shapes: `batch` sequences of `position` token ids; `prediction` one position less; `feature` of a
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts import Parts, Site, watch

# Logits of this size are held at a time, as where the losses of the intact model are taken.
_LOGIT_BYTES = 32 * 2**20

Means = Mapping[int, Float[Tensor, "head feature"]]
"""What each head mixes on average, by layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Which `heads`, as (layer, head), write something else than they would: nothing (`zero`) or
    the mean of what they write over the stimulus (`mean`).

    With `patterns_kept` every head of the model attends as if nothing had been ablated, so that
    only what flows through values is lost.
    """

    heads: tuple[tuple[int, int], ...]
    by: Literal["zero", "mean"]
    patterns_kept: bool = False

    @property
    def passes(self) -> int:
        """How many forward passes it takes: patterns are kept by those of an intact model."""
        return 2 if self.patterns_kept else 1

    def of_layer(self, layer: int) -> list[int]:
        """Its heads in a layer."""
        return [head for at, head in self.heads if at == layer]


Stage = tuple[Ablation, ...]
"""Ablations that say something only together."""


def why_not(parts: Parts) -> str | None:
    """Why the heads of a model cannot be ablated; None: they can."""
    for name in ("blocks", "unembedding"):
        if name in parts.reasons:
            return f"{name} not found: {parts.reasons[name]}"
    for block in parts.blocks:
        if "mixed" not in block.taps:
            why = block.reasons.get("mixing", "no attention was seen over all positions")
            return f"mixed values of layer {block.layer} not found: {why}"
    return None


def summed(
    parts: Parts, tokens: Int[Tensor, "batch position"]
) -> dict[int, Float[Tensor, "head feature"]]:
    """By layer, the sum of what each head of the intact model mixes over all positions."""
    sums: dict[int, Tensor] = {}

    def see(_site: Site, layer: int, mixed: Tensor) -> None:
        exact = torch.promote_types(mixed.dtype, torch.float32)
        sums[layer] = mixed.sum((0, 2), dtype=exact).cpu().double()

    watch(parts, tokens, see, sites=["mixed"])
    return sums


def ablated_losses(
    parts: Parts, tokens: Int[Tensor, "batch position"], ablation: Ablation, means: Means
) -> Float[Tensor, "batch prediction"]:
    """The cross-entropy in nats of token i + 1 given tokens 0 … i, with heads ablated.

    `means` are what takes the place of mixed values in a `mean` ablation; others need none. Where
    patterns are kept, half of the sequences pass at a time, each beside its intact self, whose
    queries and keys (where the softmax is written out: whose patterns) are taken: so no pattern is
    held that the model itself would not hold.
    Raises `ValueError` for heads that the model lacks, and `RuntimeError` where it did not run as
    its parts say.
    """
    tokens = tokens.to(parts.model.device)
    if not ablation.patterns_kept:
        return _Pass(parts=parts, tokens=tokens, ablation=ablation, means=means).losses()
    halves = tokens.split(-(-len(tokens) // 2))
    # Beside each other they are twice as many.
    pairs = [torch.cat([half, half]) for half in halves]
    return torch.cat(
        [_Pass(parts=parts, tokens=p, ablation=ablation, means=means).losses() for p in pairs]
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pass:
    """One forward pass; with patterns kept, its first half stays intact."""

    parts: Parts
    tokens: Int[Tensor, "batch position"]
    ablation: Ablation
    means: Means

    def losses(self) -> Float[Tensor, "sequence prediction"]:
        ablated = {layer for layer, _ in self.ablation.heads}
        left = {("mixed", layer) for layer in ablated} | {("unembedding_input", -1)}
        losses: list[Tensor] = []

        def see(site: Site, layer: int, tensor: Tensor) -> Tensor | None:
            left.discard((site, layer))
            if site == "unembedding_input":
                losses.append(self._losses(tensor[self._intact :]))
                return None
            if site != "mixed":
                return torch.cat([tensor[: self._intact]] * 2)
            return self._ablated(layer, tensor) if layer in ablated else None

        # What an ablation changes first is what its layer writes: patterns differ after that.
        later = range(min(ablated) + 1, len(self.parts.blocks)) if self._intact and ablated else ()
        sites: list[Site] = ["mixed", "unembedding_input"]
        if self._intact:
            sites += ["query", "key", "pattern"]
        watch(self.parts, self.tokens, see, sites=sites, layers={-1, *ablated, *later})
        if left:
            raise RuntimeError(
                f"the model ran without {sorted(left)}: expected what it ran with when its parts "
                "were found; measure it as it was then"
            )
        (seen,) = losses
        return seen

    @property
    def _intact(self) -> int:
        """How many of the sequences stay as they are."""
        return len(self.tokens) // 2 if self.ablation.patterns_kept else 0

    def _ablated(
        self, layer: int, mixed: Float[Tensor, "batch head position feature"]
    ) -> Float[Tensor, "batch head position feature"]:
        heads = self.ablation.of_layer(layer)
        if max(heads) >= mixed.shape[1]:
            raise ValueError(
                f"ablation of head {max(heads)} in layer {layer}, which has {mixed.shape[1]} heads"
            )
        exchanged = mixed.clone()
        if self.ablation.by == "zero":
            exchanged[self._intact :, heads] = 0
        else:
            means = rearrange(self.means[layer][heads], "head feature -> head 1 feature")
            exchanged[self._intact :, heads] = means.to(mixed)
        return exchanged

    def _losses(
        self, normed: Float[Tensor, "sequence position feature"]
    ) -> Float[Tensor, "sequence prediction"]:
        """From a chunk of logits at a time."""
        if self.parts.unembedding_map is None:
            raise ValueError(f"no unembedding: {self.parts.reasons.get('unembedding')}")
        targets = self.tokens[self._intact :, 1:]
        rows = max(1, _LOGIT_BYTES // (4 * len(self.parts.unembedding_map.read()[0])))
        chunks = zip(
            normed[:, :-1].flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True
        )
        losses = [
            F.cross_entropy(self.parts.unembed(some).float(), ids, reduction="none")
            for some, ids in chunks
        ]
        return torch.cat(losses).view_as(targets).cpu()
