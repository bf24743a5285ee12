"""Ablating heads within the time that a measurement may spend on it, on all processes alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from monitor.ablating import Ablation, Stage, ablated_losses, mean_values
from monitor.parts import Parts
from monitor.ranks import Ranks, portable
from monitor.stimuli import Stimulus

Losses = dict[Ablation, dict[str, Tensor]]

_Made = TypeVar("_Made")


@dataclass(slots=True, kw_only=True, eq=False)
class Budget:
    """The `seconds` that may be spent (None: as many as it takes), and what one pass over all
    stimuli was seen to take.
    """

    seconds: float | None
    each: float
    spent: float = 0.0

    def affords(self, stage: Stage) -> bool:
        """Whether all of a stage can be made."""
        passes = sum(ablation.passes for ablation in stage)
        return self.seconds is None or self.spent + passes * self.each <= self.seconds


def intervene(
    parts: Parts,
    stimuli: Mapping[str, Stimulus],
    stages: Sequence[Stage],
    ranks: Ranks,
    budget: Budget,
) -> Losses:
    """The losses on each stimulus under the ablations of as many stages as the budget affords, in
    turn; on the first process, which decides. An error on any of them is raised there.

    All processes call this, the others with any stages. Notes in the budget what was spent.
    """
    begun = time.perf_counter()
    everywhere = _Everywhere(parts=parts, stimuli=stimuli, ranks=ranks)
    losses: Losses = {}

    def following() -> Ablation | None:
        """The next ablation, or None where no more can be paid for."""
        budget.spent = time.perf_counter() - begun
        for stage in stages if not everywhere.broken else ():
            left = [ablation for ablation in stage if ablation not in losses]
            # What was begun is finished.
            if left and (len(left) < len(stage) or budget.affords(stage)):
                return left[0]
            if left:
                break
        return None

    means: dict[str, dict[int, Tensor]] | None = None
    while (ablation := ranks.share(following)) is not None:
        before = time.perf_counter()
        means = everywhere.means() if means is None else means
        seen = everywhere.losses(ablation, means)
        if ranks.first:
            losses[ablation] = seen
        budget.each = (time.perf_counter() - before) / ablation.passes
    budget.spent = time.perf_counter() - begun
    for error in everywhere.broken:
        raise error
    return losses


@dataclass(slots=True, kw_only=True, eq=False)
class _Everywhere:
    """Passes that each process makes on its part of the stimuli; `broken` is what they raised."""

    parts: Parts
    stimuli: Mapping[str, Stimulus]
    ranks: Ranks
    broken: list[Exception] = field(default_factory=list)

    def means(self) -> dict[str, dict[int, Tensor]]:
        """What each head mixes on average: by stimulus, then by layer."""
        return {name: self._means(name) for name in self.stimuli}

    def losses(
        self, ablation: Ablation, means: Mapping[str, dict[int, Tensor]]
    ) -> dict[str, Tensor]:
        """The losses on each stimulus under an ablation, on the first process."""

        def losses_on(name: str) -> Tensor:
            def work(part: Stimulus) -> Tensor:
                return ablated_losses(self.parts, part, ablation, means[name])

            return _joined(self._seen(name, work))

        return {name: losses_on(name) for name in self.stimuli}

    def _means(self, name: str) -> dict[int, Tensor]:
        seen = self._seen(name, lambda part: mean_values(self.parts, part))

        def averaged() -> dict[int, Tensor]:
            layers = seen[0][1] if seen else {}
            return {
                layer: _joined([(first, one[layer]) for first, one in seen]).mean(0)
                for layer in layers
            }

        return self.ranks.share(averaged)

    def _seen(self, name: str, work: Callable[[Stimulus], _Made]) -> list[tuple[int, _Made]]:
        """What the processes make of their parts of a stimulus, each with its first sequence; on
        the first process, and without those that raised.
        """
        start, stop = self.ranks.rows(len(self.stimuli[name].tokens))
        part = self.stimuli[name].rows(start, stop, torch.device("cpu"))
        made: _Made | Exception
        try:
            made = work(part)
        except Exception as error:
            made = portable(error) if self.ranks.count > 1 else error
        gathered = self.ranks.gather((start, made))
        self.broken += [one for _, one in gathered if isinstance(one, Exception)]
        return [(first, one) for first, one in gathered if not isinstance(one, Exception)]


def _joined(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """One row a sequence, from parts that may overlap."""
    rows = {first + number: row for first, part in parts for number, row in enumerate(part)}
    return torch.stack([rows[number] for number in sorted(rows)]) if rows else torch.empty(0)
