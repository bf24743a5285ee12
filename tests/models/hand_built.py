"""Tiny language models written out in full, and their training on repeated tokens.

Shapes: `batch` sequences of `position` token ids, logits over the `vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PlantedInduction(nn.Module):
    """An induction circuit by hand: layer 0 moves each token one position on, layer 1 matches it.

    The residual stream holds three one-hot vectors: the token, the position, and the token before.
    Position 0 has nothing before it but itself.
    """

    def __init__(self, *, vocab_size: int, context: int, sharpness: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, vocab_size, _weight=torch.eye(vocab_size))
        self.position = nn.Embedding(context, context, _weight=torch.eye(context))
        self.sharpness = sharpness

    def forward(self, tokens: Tensor) -> Tensor:
        token = self.token(tokens)
        position = self.position(torch.arange(tokens.shape[1])).expand(len(tokens), -1, -1)
        one_before = F.pad(position[:, :-1], (0, 0, 1, 0))
        previous = self._attend(one_before, position, token)
        return self.sharpness * self._attend(token, previous, token)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        one_head = (t[:, None] for t in (query, key, value))
        return F.scaled_dot_product_attention(*one_head, is_causal=True, scale=self.sharpness)[:, 0]


class AttentionOnly(nn.Module):
    """A transformer of attention layers alone, with learned positions."""

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        context: int = 64,
        layers: int = 2,
        width: int = 64,
        heads: int = 4,
        attend: Callable[..., Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            AttentionBlock(width=width, heads=heads, attend=attend or attend_causally)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        residual = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            residual = block(residual)
        return self.unembedding(self.norm(residual))


class AttentionBlock(nn.Module):
    """One layer of attention; `attend` maps queries, keys and values to what is mixed."""

    def __init__(self, *, width: int, heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def projected(self, residual: Tensor) -> Tensor:
        """Queries, keys and values."""
        return rearrange(
            self.inputs(self.norm(residual)),
            "batch position (three head feature) -> three batch head position feature",
            three=3,
            head=self.heads,
        )

    def forward(self, residual: Tensor) -> Tensor:
        query, key, value = self.projected(residual)
        mixed = self.attend(query, key, value)
        mixed = rearrange(mixed, "batch head position feature -> batch position (head feature)")
        return residual + self.output(mixed)


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def attend_everywhere(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The softmax written out, as eager models have it."""
    later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(later, float("-inf")).softmax(-1) @ value


def attend_by_sums(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The softmax written as exponentials over their sum: no function's name gives it away."""
    later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    shifted = scores.masked_fill(later, float("-inf"))
    raised = (shifted - shifted.amax(-1, keepdim=True)).exp()
    return (raised @ value) / raised.sum(-1, keepdim=True)


class Bigram(nn.Module):
    """A language model that sees one token, and has no attention."""

    def __init__(self, *, vocab_size: int = 64) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, 8)
        self.unembedding = nn.Linear(8, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembedding(self.token(tokens))


def repeated_at(
    period: Tensor, *, vocab_size: int, context: int, generator: torch.Generator
) -> Tensor:
    """Token 0, then distinct random tokens repeated at the `period` of each sequence."""
    shuffled = torch.rand(len(period), vocab_size - 1, generator=generator).argsort(dim=1) + 1
    index = torch.arange(context - 1) % period[:, None]
    return torch.cat([torch.zeros(len(period), 1, dtype=torch.long), shuffled.gather(1, index)], 1)


def train(
    model: nn.Module,
    periods: tuple[int, int],
    *,
    steps: int,
    rate: float = 1e-3,
    seen: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains on repeated tokens (batch 64, vocabulary 64, context 64, AdamW); `seen` after a step.

    The period is drawn for each sequence, from the first of `periods` to the last.
    """
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(1, steps + 1):
        period = torch.randint(periods[0], periods[1] + 1, (64,), generator=generator)
        tokens = repeated_at(period, vocab_size=64, context=64, generator=generator)
        logits = model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen(step)
