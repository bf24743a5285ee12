"""Concepts for models that read random token ids, each half of the tokens or less."""

from __future__ import annotations

import torch

from monitor.concepts import Analogies, Concept


def after_even(ids: torch.Tensor) -> torch.Tensor:
    return ids.roll(1, dims=1) % 2 == 0


CONCEPTS = (
    Concept("even", help="Has an even token id.", label=lambda ids: ids % 2 == 0),
    Concept("third", help="Has a token id that 3 divides.", label=lambda ids: ids % 3 == 0),
    # Of the context, and not of the token.
    Concept("after_even", help="Follows an even token id.", label=after_even),
)

# Of words that nobody trained.
RELATION = Analogies("next", quadruples=[(a, a + 1, a + 5, a + 6) for a in range(10, 18)])
