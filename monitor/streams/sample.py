"""A sample of the residual stream.

Shapes: `layer` counts the places between blocks: 0 is what enters the first block, l + 1 what block
l returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts import Parts
from monitor.parts.flow import Tap
from monitor.stimuli import Stimulus
from monitor.streams.reading import check_blocks, rows_of

# Positions near each other hold much the same: more of them would say little more.
_SAMPLED = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamSample:
    """The residual stream at the same few `positions` of every sequence, in float32 on the CPU."""

    rows: Float[Tensor, "layer batch sampled feature"]
    positions: Int[Tensor, " sampled"]

    def sequences(self, start: int, stop: int) -> StreamSample:
        """The stream of sequences `start` to `stop`."""
        return dataclasses.replace(self, rows=self.rows[:, start:stop])

    @staticmethod
    def join(parts: Sequence[StreamSample]) -> StreamSample:
        """The stream of a batch that was cut into parts."""
        return dataclasses.replace(parts[0], rows=torch.cat([part.rows for part in parts], dim=1))


def sampled_positions(positions: int) -> Int[Tensor, " sampled"]:
    """At most 16 of so many positions, spread evenly. All of them predict a token of the sequence,
    the last that does is among them, and the first position is not: much in it is like nowhere
    else.

    >>> sampled_positions(8)
    tensor([1, 2, 3, 4, 5, 6])
    """
    spread = torch.linspace(1, positions - 2, max(0, min(_SAMPLED, positions - 2)))
    return spread.round().long()


class Sampler:
    """Keeps a sample of the stream while a model runs.

    Raises `UnseenError` where the model's blocks are not known.
    """

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        check_blocks(parts)
        self._parts = parts
        self._tokens = stimulus.tokens
        self.positions = sampled_positions(stimulus.tokens.shape[1])
        ends = [parts.blocks[0].taps["residual_before"]]
        self._taps = ends + [block.taps["residual_after"] for block in parts.blocks]
        self._kept: dict[Tap, Tensor] = {}

    @property
    def left(self) -> set[Tap]:
        """What was not seen yet."""
        return set(self._taps) - self._kept.keys()

    def see(self, tap: Tap, tensor: Tensor) -> None:
        """Takes what passes."""
        if tap in self.left:
            seen = rows_of(self._parts, tap, tensor, self._tokens)
            self._kept[tap] = seen[:, self.positions.to(seen.device)]

    def rows(self) -> Float[Tensor, "layer batch sampled feature"]:
        """What was kept, as the model has it and where it has it."""
        return torch.stack([self._kept[tap] for tap in self._taps])

    def predictions(
        self,
    ) -> tuple[Float[Tensor, "layer batch sampled feature"], Int[Tensor, "batch sampled"]]:
        """Every second of them, the last included, and the tokens that come next there."""
        some = slice(1 - len(self.positions) % 2, None, 2)
        following = self.positions[some].to(self._tokens.device) + 1
        return self.rows()[:, :, some], self._tokens[:, following]
