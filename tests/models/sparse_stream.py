"""A language model whose stream is a sparse sum of known directions."""

from __future__ import annotations

import torch

from tests.models.hand_built import AttentionOnly
from tests.oracles import dictionary as oracle

VOCABULARY, CONTEXT, WIDTH, LAYERS = 1500, 32, 32, 3


class SparseStream(AttentionOnly):
    """Each token's embedding is a sum of four out of 64 directions, to which blocks add little; it
    predicts the token with the next id.
    """

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCABULARY, context=CONTEXT, width=WIDTH, layers=LAYERS)
        self.directions, rows = oracle.planted(tokens=VOCABULARY, features=WIDTH, seed=7)
        rows = rows - 3
        with torch.no_grad():
            self.token.weight.copy_(rows)
            self.position.weight.mul_(0.01)
            for block in self.blocks:
                for name, weight in block.named_parameters():
                    weight.mul_(0.01 if weight.ndim > 1 and "norm" not in name else 1)
            centred = rows - rows.mean(1, keepdim=True)
            self.unembedding.weight.copy_(
                6 * (centred / centred.norm(dim=1, keepdim=True)).roll(1, 0)
            )


def counting(sequences: int, seed: int = 0) -> torch.Tensor:
    """Sequences of consecutive token ids."""
    random = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (sequences, 1), generator=random)
    return (first + torch.arange(CONTEXT)) % VOCABULARY
