"""Attention whose rows can be had, some queries at a time: masks, biases, whole patterns.

Shapes: `batch head query key`; `row` is a query of the block that is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.attention.layer import LayerAttention
from monitor.stimuli import Stimulus

# Attention of this size is held at a time.
BLOCK_BYTES = 8 * 2**20

# A score this low hides a key: exp of it is 0 in every floating point type.
HIDDEN = -1e4

# The attention of some queries, which keys they have in view, and the largest score of each: -inf
# where no key is in view, None where no scores are seen.
Rows = tuple[
    Float[Tensor, "batch head row key"],
    Bool[Tensor, "#batch #head row key"],
    Float[Tensor, "batch head row"] | None,
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pattern:
    """A whole attention pattern, as an adapter may have it: rows that sum to 1, or to less where
    something that is no token (a learned sink, say) takes a share.

    `in_view` says which keys a query could attend to; by default all up to its own position where
    no query attends to a later one, else all.
    """

    weights: Float[Tensor, "batch head query key"]
    in_view: Bool[Tensor, "#batch #head query key"] | None = None

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, None]:
        """The attention on the stimulus's targets; the output is left to the model."""
        in_view = self.in_view
        if in_view is None:
            everything = torch.ones_like(self.weights[:1, :1], dtype=torch.bool)
            causal = not bool(self.weights.triu(1).any())
            in_view = everything.tril() if causal else everything

        def rows(block: slice) -> Rows:
            return self.weights[:, :, block].float(), in_view[:, :, block], None

        return reduce_rows(rows, stimulus, heads=self.weights.shape[1]), None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """The scores that a softmax over keys is taken of, masked and scaled as it gets them."""

    scores: Float[Tensor, "batch head query key"]

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, None]:
        """The attention on the stimulus's targets; the output is left to the model."""

        def rows(block: slice) -> Rows:
            scores = self.scores[:, :, block].float()
            # Written so that what is not a number is in view, and shows.
            return attended(scores, ~(scores <= HIDDEN))

        return reduce_rows(rows, stimulus, heads=self.scores.shape[1]), None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offsets:
    """How far back is attended at a stimulus's sampled queries, and would be evenly."""

    sampled: Int[Tensor, "batch sample"]
    attended: Float[Tensor, "batch head offset"]
    uniform: Float[Tensor, "batch head offset"]

    @classmethod
    def none(cls, stimulus: Stimulus, heads: int) -> Offsets:
        """No query was added yet."""
        if stimulus.sampled is None:
            raise ValueError("a stimulus without sampled queries shows no offsets")
        batch, positions = stimulus.tokens.shape
        attended, uniform = torch.zeros(2, batch, heads, positions)
        return cls(sampled=stimulus.sampled, attended=attended, uniform=uniform)

    def add(
        self,
        weights: Float[Tensor, "batch head row key"],
        in_view: Bool[Tensor, "#batch #head row key"],
        start: int,
    ) -> None:
        """Adds those of the sampled queries that are among the rows, which begin at `start`."""
        batch, heads, rows, _ = weights.shape
        here = (self.sampled >= start) & (self.sampled < start + rows)
        sequence, query = here.nonzero()[:, 0], self.sampled[here]
        seen = in_view.expand(batch, heads, -1, -1)[sequence, :, query - start]
        self.add_rows(sequence, query, weights[sequence, :, query - start], seen)

    def add_rows(
        self,
        sequence: Int[Tensor, " sampled"],
        query: Int[Tensor, " sampled"],
        weights: Float[Tensor, "sampled head key"],
        in_view: Bool[Tensor, "sampled head key"],
    ) -> None:
        """Adds the rows of sampled queries."""
        key = query[:, None] - torch.arange(weights.shape[-1], device=query.device)
        back = key.clamp(min=0)[:, None].expand_as(weights)
        evenly = in_view / in_view.sum(-1, keepdim=True).clamp(min=1)
        for total, attention in ((self.attended, weights), (self.uniform, evenly)):
            at_offset = attention.gather(-1, back).where((key >= 0)[:, None], 0.0)
            mean = at_offset / self.sampled.shape[1]
            total.index_add_(0, sequence.cpu(), mean.to(total.dtype).cpu())


def attended(
    scores: Float[Tensor, "batch head row key"], in_view: Bool[Tensor, "#batch #head row key"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a softmax over the keys in view: no attention, not NaN, where there is no key."""
    scores = scores.masked_fill(~in_view, -math.inf)
    weights = scores.softmax(-1).masked_fill_(~in_view.any(-1, keepdim=True), 0.0)
    return weights, in_view, scores.amax(-1)


def largest_seen(scores: Float[Tensor, "batch head row"]) -> Float[Tensor, "batch head"]:
    """The largest of the rows' largest scores: 0 where no key is in view."""
    largest = scores.amax(-1)
    return largest.masked_fill(largest == -math.inf, 0.0)


def reduce_rows(rows: Callable[[slice], Rows], stimulus: Stimulus, *, heads: int) -> LayerAttention:
    """The attention on a stimulus's targets, from the rows of some queries at a time."""
    batch, positions = stimulus.tokens.shape
    size = max(1, BLOCK_BYTES // (4 * batch * heads * positions))
    mass = {name: torch.zeros(batch, heads) for name in stimulus.targets}
    uniform = {name: torch.zeros(batch, heads) for name in stimulus.targets}
    entropy, normalized, uniform_entropy = (torch.zeros(batch, heads) for _ in range(3))
    causal = True
    largest: list[Tensor] = []
    offsets = None if stimulus.sampled is None else Offsets.none(stimulus, heads)
    for start in range(0, positions, size):
        weights, in_view, scores = rows(slice(start, start + size))
        length = in_view.sum(-1).clamp(min=1)
        evenly = in_view / length[..., None]
        causal = causal and not bool(in_view.triu(start + 1).any())
        for name, target in stimulus.targets.items():
            here = (target.query >= start) & (target.query < start + size)
            sequence, key = target.sequence[here], target.key[here]
            query = target.query[here] - start
            for total, attention in ((mass[name], weights), (uniform[name], evenly)):
                attended = attention.expand(batch, heads, -1, -1)[sequence, :, query, key]
                total.index_add_(0, sequence.cpu(), attended.cpu())
        if offsets is not None:
            offsets.add(weights, in_view, start)
        # The first query sees itself alone.
        later = slice(1 if start == 0 else 0, None)
        log_length = length.log().expand(batch, heads, -1)[..., later]
        uniform_entropy += log_length.sum(-1).cpu()
        if stimulus.entropy:
            surprise = torch.special.entr(weights[:, :, later]).sum(-1)
            entropy += surprise.sum(-1).cpu()
            normalized += (surprise / log_length).where(log_length > 0, 0.0).sum(-1).cpu()
            if scores is not None:
                largest.append(scores.amax(-1, keepdim=True).cpu())
    return LayerAttention(
        mass=mass,
        uniform=uniform,
        entropy=entropy if stimulus.entropy else None,
        normalized_entropy=normalized if stimulus.entropy else None,
        uniform_entropy=uniform_entropy,
        causal=causal,
        largest_logit=largest_seen(torch.cat(largest, dim=-1)) if largest else None,
        offsets=None if offsets is None else offsets.attended,
        uniform_offsets=None if offsets is None else offsets.uniform,
    )
