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

# With fewer sources than these their sequences may serve different purposes, each its own source.
FEWEST_SOURCES = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labels:
    """Of every token and concept 1 where the token has it, -1 where it has not, 0 where it does not
    count. `split` says what a sequence is for, `length` how many of its tokens are no padding, and
    `source` where it is from: sequences of one source, windows of one file say, are alike, and only
    sources are independent of each other.
    """

    names: tuple[str, ...]
    values: Int8[Tensor, "concept batch position"]
    split: Int[Tensor, " batch"]
    length: Int[Tensor, " batch"]
    source: Int[Tensor, " batch"]

    def rows(self, start: int, stop: int, device: torch.device) -> Labels:
        """The labels of sequences `start` to `stop`, on `device`."""
        return Labels(
            names=self.names,
            values=self.values[:, start:stop].to(device),
            split=self.split[start:stop].to(device),
            length=self.length[start:stop].to(device),
            source=self.source[start:stop].to(device),
        )

    @property
    def used(self) -> Bool[Tensor, "batch position"]:
        """Tokens to look at: no padding, and not the first, where much is like nowhere else."""
        position = torch.arange(self.values.shape[2], device=self.length.device)
        return (position > 0) & (position < self.length[:, None])

    @property
    def place(self) -> Int[Tensor, " batch"]:
        """The number of every sequence's source among those that are for the same."""
        number = torch.zeros_like(self.source)
        for split in self.split.unique():
            number += self.numbered(self.split == split).clamp(min=0)
        return number

    def numbered(self, among: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The number of every sequence's source among the sources of some sequences; -1 for the
        other sequences.
        """
        number = torch.full_like(self.source, -1)
        number[among] = self.source[among].unique(return_inverse=True)[1]
        return number

    def sources(self, among: Bool[Tensor, "*which batch"]) -> Int[Tensor, "*which"]:
        """How many sources some sequences have."""
        flat = among.reshape(-1, among.shape[-1])
        counts = [len(self.source[which].unique()) for which in flat]
        return torch.tensor(counts, dtype=torch.int64).reshape(among.shape[:-1])
