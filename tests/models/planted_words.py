"""Words between which relations are planted, as directions of an embedding or not at all.

Shapes: `word` token ids from 1 on, `feature` of the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.hand_built import AttentionOnly

NAMES = ("king", "queen", "man", "woman", "prince", "princess", "boy", "girl")
WORD = {name: 1 + place for place, name in enumerate(NAMES)}
ROYALTY = tuple(
    tuple(WORD[name] for name in quadruple.split())
    for quadruple in (
        "king man woman queen",
        "prince boy girl princess",
        "king man girl princess",
        "queen woman boy prince",
        "queen woman man king",
        "prince boy woman queen",
    )
)
GENDER = tuple(
    tuple(WORD[name] for name in quadruple.split())
    for quadruple in (
        "king queen woman man",
        "prince princess girl boy",
        "man woman princess prince",
    )
)


def royal_vectors(width: int = 64, *, noise: float = 0.05, seed: int = 0) -> Tensor:
    """[word feature] of `NAMES`: what is royal, male and young each along a direction of its own.
    A word is nearest to that which differs from it in age, so that no analogy here is right by
    what is nearest alone.
    """
    random = torch.Generator().manual_seed(seed)
    royal, male, young = torch.linalg.qr(torch.randn(width, 3, generator=random))[0].T
    rows = [
        (name in {"king", "queen", "prince", "princess"}) * 1.0 * royal
        + (name in {"king", "man", "prince", "boy"}) * 1.2 * male
        + (name in {"prince", "princess", "boy", "girl"}) * 0.5 * young
        for name in NAMES
    ]
    shared = torch.randn(width, generator=random) / width**0.5
    scatter = noise * torch.randn(len(rows), width, generator=random) / width**0.5
    return torch.stack(rows) + shared + scatter


def paired_vectors(pairs: int, width: int = 64, *, seed: int = 0) -> tuple[Tensor, list]:
    """Words in close pairs, and the quadruples (a, b, c, d) in which c and d are one of them: there
    is nothing that two pairs' offsets have in common.
    """
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(pairs, 1, width, generator=random)
    vectors = centres + 0.1 * torch.randn(pairs, 2, width, generator=random)
    quadruples = [
        (2 * one + 1, 2 * one + 2, 2 * ((one + 1) % pairs) + 2, 2 * ((one + 1) % pairs) + 1)
        for one in range(pairs)
    ]
    return vectors.flatten(0, 1), quadruples


def model_of(vectors: Tensor, *, layers: int = 2) -> AttentionOnly:
    """A model that embeds words 1, 2, … as `vectors`, with blocks that add little to them."""
    torch.manual_seed(0)
    vocab_size, width = len(vectors) + 8, vectors.shape[1]
    model = AttentionOnly(vocab_size=vocab_size, width=width, layers=layers, context=32)
    with torch.no_grad():
        model.token.weight[1 : 1 + len(vectors)] = vectors
        model.position.weight *= 0.01
        for block in model.blocks:
            block.output.weight *= 0.01
    return model
