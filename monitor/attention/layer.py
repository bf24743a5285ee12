"""What one attention layer showed, reduced to sums for each sequence and head.

Shapes: `batch head query key`; `pair` is one (query, key) entry of a target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.stimuli import Stimulus


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerAttention:
    """The attention of one layer on one stimulus, summed over the queries of each sequence.

    `mass` holds, for each of the stimulus's targets, the attention on the target's keys, and
    `uniform` what it would be if every query attended equally to all keys in its view.
    `entropy` sums the entropies in nats over all queries but the first, which sees only itself;
    `normalized_entropy` sums the same divided by the log of the number of keys in view, and
    `uniform_entropy` those logs. `largest_logit` is the largest score that the softmax gets in each
    sequence. It and the first two are None where the stimulus wants no entropy, and it also where
    no scores are seen.
    `offsets` holds how far back is attended: the mean over the stimulus's sampled queries of the
    attention to the key so many positions before, and `uniform_offsets` the same for attention to
    all keys in view equally; None where no queries are sampled.
    `causal`: no query sees a later key. `layer` and the attending `module`'s path are known once
    the whole pass was seen.
    """

    mass: Mapping[str, Float[Tensor, "batch head"]]
    uniform: Mapping[str, Float[Tensor, "batch head"]]
    entropy: Float[Tensor, "batch head"] | None
    normalized_entropy: Float[Tensor, "batch head"] | None
    uniform_entropy: Float[Tensor, "batch head"]
    causal: bool
    largest_logit: Float[Tensor, "batch head"] | None = None
    offsets: Float[Tensor, "batch head offset"] | None = None
    uniform_offsets: Float[Tensor, "batch head offset"] | None = None
    layer: int = -1
    module: str = ""

    def at(self, layer: int, module: str) -> LayerAttention:
        """The same attention, named."""
        return dataclasses.replace(self, layer=layer, module=module)

    def rows(self, start: int, stop: int) -> LayerAttention:
        """The attention in sequences `start` to `stop`."""
        return self._with([self], lambda tensors: tensors[0][start:stop])

    @staticmethod
    def join(parts: Sequence[LayerAttention]) -> LayerAttention:
        """One layer's attention on a batch that was cut into parts."""
        return parts[0]._with(parts, torch.cat)

    def _with(
        self, parts: Sequence[LayerAttention], combine: Callable[[list[Tensor]], Tensor]
    ) -> LayerAttention:
        """The same with every tensor combined from those of the parts."""

        def combined(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else combine(tensors)

        return dataclasses.replace(
            self,
            mass={name: combine([p.mass[name] for p in parts]) for name in self.mass},
            uniform={name: combine([p.uniform[name] for p in parts]) for name in self.uniform},
            entropy=combined("entropy"),
            normalized_entropy=combined("normalized_entropy"),
            uniform_entropy=combine([part.uniform_entropy for part in parts]),
            causal=all(part.causal for part in parts),
            largest_logit=combined("largest_logit"),
            offsets=combined("offsets"),
            uniform_offsets=combined("uniform_offsets"),
        )


@runtime_checkable
class AttentionCall(Protocol):
    """One computation of attention over a whole stimulus, in whatever form it was seen."""

    def reduce(self, stimulus: Stimulus) -> tuple[LayerAttention, Any]:
        """The attention on the stimulus's targets; and what the computation gives the model, or
        None where that did not fall out on the way.
        """
        ...
