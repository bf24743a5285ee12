"""What direct logit attribution asks, and the sums that it answers with.

Shapes: `question` is a query whose next token is known from an earlier copy; `way` is one of two,
the correct next token and a shuffled one; `batch` sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.stimuli import NO_PERIOD, Stimulus
from monitor.streams.reading import UnseenError


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Component:
    """What a term belongs to; `layer` and `head` are -1 where it has none."""

    kind: str
    layer: int = -1
    head: int = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttributionSums:
    """The components' terms of the logit of the `correct` next token and of a `shuffled` one,
    summed over the `questions` of each sequence. The last component is the logit itself.
    """

    components: tuple[Component, ...]
    correct: Float[Tensor, "component batch"]
    shuffled: Float[Tensor, "component batch"]
    questions: Int[Tensor, " batch"]

    def sequences(self, start: int, stop: int) -> AttributionSums:
        """The sums of sequences `start` to `stop`."""
        return dataclasses.replace(
            self,
            correct=self.correct[:, start:stop],
            shuffled=self.shuffled[:, start:stop],
            questions=self.questions[start:stop],
        )

    @staticmethod
    def join(parts: Sequence[AttributionSums]) -> AttributionSums:
        """The sums of a batch that was cut into parts."""
        return dataclasses.replace(
            parts[0],
            correct=torch.cat([part.correct for part in parts], dim=1),
            shuffled=torch.cat([part.shuffled for part in parts], dim=1),
            questions=torch.cat([part.questions for part in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Questions:
    """The queries in later copies of a stimulus whose next token the sequence holds, that token,
    and another of the same block.
    """

    sequence: Int[Tensor, " question"]
    query: Int[Tensor, " question"]
    targets: Int[Tensor, "way question"]

    @classmethod
    def of(cls, stimulus: Stimulus) -> Questions:
        """Depends on each sequence alone, so that it is the same in every part of a stimulus.

        Raises `UnseenError` where nothing is repeated.
        """
        tokens, found = stimulus.tokens.cpu(), []
        for row, (ids, period) in enumerate(zip(tokens, stimulus.period.tolist(), strict=True)):
            query = torch.arange(stimulus.lead + max(period, 0), tokens.shape[1] - 1)
            if period == NO_PERIOD or not len(query):
                continue
            other = _exchanged(ids[stimulus.lead : stimulus.lead + period])
            place = (query + 1 - stimulus.lead) % period
            rows = torch.full_like(query, row)
            found.append(torch.stack([rows, query, ids[query + 1], other[place]]))
        if not found:
            raise UnseenError(f"the stimulus {stimulus.name} repeats nothing")
        sequence, query, correct, shuffled = torch.cat(found, dim=1).to(stimulus.tokens.device)
        return cls(sequence=sequence, query=query, targets=torch.stack([correct, shuffled]))


def _exchanged(block: Int[Tensor, " place"]) -> Int[Tensor, " place"]:
    """For each token of a block another of it, each once, drawn by the block itself."""
    order = torch.from_numpy(np.random.default_rng(block.tolist()).permutation(len(block)))
    other = torch.empty_like(block)
    other[order] = block[order.roll(1)]
    return other
