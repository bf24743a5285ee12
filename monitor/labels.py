"""Which tokens of a stimulus have which concept.

Shapes: `concept` what the tokens are labelled with; `batch` sequences of `position` token ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int8
from torch import Tensor

# What sequences are for: what is fitted is fitted on two halves, so that these can be compared, and
# told of on sequences that were in neither.
FIRST_HALF, SECOND_HALF, EVALUATION = range(3)


# Tokens of each side, in each part of the sequences: with fewer next to nothing can be said.
FEWEST = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labels:
    """Of every token and concept 1 where the token has it, -1 where it has not, 0 where it does not
    count. `split` says what a sequence is for, `length` how many of its tokens are no padding.
    """

    names: tuple[str, ...]
    values: Int8[Tensor, "concept batch position"]
    split: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]

    def rows(self, start: int, stop: int, device: torch.device) -> Labels:
        """The labels of sequences `start` to `stop`, on `device`."""
        return Labels(
            names=self.names,
            values=self.values[:, start:stop].to(device),
            split=self.split[start:stop].to(device),
            length=self.length[start:stop].to(device),
        )

    @property
    def used(self) -> Bool[Tensor, "batch position"]:
        """Tokens to look at: no padding, and not the first, where much is like nowhere else."""
        position = torch.arange(self.values.shape[2], device=self.length.device)
        return (position > 0) & (position < self.length[:, None])

    @property
    def place(self) -> Int[Tensor, " batch"]:
        """The number of every sequence among those that are for the same."""
        return (self.split[:, None] == self.split).tril().sum(1) - 1
