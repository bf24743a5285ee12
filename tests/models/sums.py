"""Models that are asked sums of two numbers: one that looks all answers up, whose logits are given,
and the shapes that real ones have.

Shapes: `batch` questions of `position` token ids; `number` those that are added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def every_pair(p: int) -> Tensor:
    number = torch.arange(p)
    return torch.cartesian_prod(number, number)


def random_pairs(p: int, share: float = 0.4, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    kept = torch.randperm(p * p, generator=random)[: int(share * p * p)]
    return every_pair(p)[kept]


def wave_logits(p: int, keys: list[int], amplitude: float, *, minus: bool = False) -> Tensor:
    """Of all pairs: the sum over keys of amplitude × cos(2π k (a + b - c) / p); or of a - b."""
    a, b = every_pair(p).unbind(1)
    given = (a - b if minus else a + b)[:, None] - torch.arange(p)
    waves = [torch.cos(2 * math.pi * k * given.double() / p) for k in keys]
    return amplitude * torch.stack(waves).sum(0)


def memorised_logits(p: int, train: Tensor, height: float = 20.0, *, seed: int = 0) -> Tensor:
    """Of all pairs: sure of the right answer to training pairs, of some answer to the others."""
    random = torch.Generator().manual_seed(seed)
    answers = torch.randint(p, (p * p,), generator=random)
    known = train @ torch.tensor([p, 1])
    answers[known] = train.sum(1) % p
    return height * F.one_hot(answers, p).double()


class LooksUp(nn.Module):
    """The given logits of all pairs [question number], at the last of three positions; nothing is
    likely elsewhere. Reads a, b and "=", which has no logit.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.p = logits.shape[1]
        self.table = nn.Embedding.from_pretrained(logits, freeze=False)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] != 3:
            raise ValueError(f"reads 3 tokens, got {tokens.shape[1]}")
        found = self.table(tokens[:, 0] * self.p + tokens[:, 1])
        nothing = torch.zeros_like(found)
        return torch.stack([nothing, nothing, found], dim=1)


class AnswerOnly(nn.Module):
    """Embeds two numbers, one hidden layer: logits [batch, number] of the answer alone."""

    def __init__(self, p: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p, width)
        self.hidden = nn.Linear(2 * width, 32)
        self.unembedding = nn.Linear(32, p)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembedding(self.hidden(self.embedding(tokens).flatten(1)).relu())


class OneByOne(AnswerOnly):
    """The same, which embeds its two numbers one after the other and keeps a position."""

    def forward(self, tokens: Tensor) -> Tensor:
        both = [self.embedding(tokens[:, 0]), self.embedding(tokens[:, 1])]
        return self.unembedding(self.hidden(torch.cat(both, dim=1)).relu())[:, None]


class ShortTransformer(nn.Module):
    """One block of attention over exactly the positions of a, b and "=", which has no logit: like
    that of Nanda et al. 2023.
    """

    def __init__(self, p: int, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(p + 1, width)
        self.positions = nn.Embedding(3, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.unembedding = nn.Linear(width, p, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        query, key, value = self.qkv(x)[:, None].chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.unembedding(x + mixed[:, 0])
