"""What one measurement of a model leaves to the next.

Shapes: `layer` places between blocks, `batch` sequences, `sampled` positions of each, `feature` of
the stream; `turned` features in which no distance between tokens is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from monitor.capture import Observation
from monitor.dictionary import Dictionaries
from monitor.intervening import Spending
from monitor.parts import Parts


@dataclass(slots=True, eq=False)
class Memory:
    """What one measurement of a model leaves to the next: its parts, and what was observed.

    `spending` is what interventions take. Of what was observed the residual stream is kept, on text
    or else on repeated tokens: shifted and turned into no more dimensions than there are tokens,
    which leaves the distances between them; and the directions of concepts. `dictionaries` are
    trained further at the next measurement.
    """

    parts: Parts | None = None
    searches: int = 0
    spending: Spending = dataclasses.field(default_factory=Spending)
    first: Mapping[str, Observation] = dataclasses.field(default_factory=dict)
    previous: Mapping[str, Observation] = dataclasses.field(default_factory=dict)
    dictionaries: Dictionaries = dataclasses.field(default_factory=dict)

    def keep(self, observations: Mapping[str, Observation]) -> None:
        """Keeps what the next measurement compares itself with. What is not finite is not kept."""
        kept = _stream(observations) | _directions(observations)
        self.previous = {**self.previous, **kept}
        self.first = {**kept, **self.first}


def _stream(observations: Mapping[str, Observation]) -> dict[str, Observation]:
    for name in ("text", "repeated"):
        seen = observations.get(name)
        if seen is None or seen.stream is None:
            continue
        if not seen.stream.rows.isfinite().all():
            break
        stimulus = dataclasses.replace(seen.stimulus, targets={})
        stream = dataclasses.replace(seen.stream, rows=_turned(seen.stream.rows))
        return {name: Observation(stimulus=stimulus, vocab_size=seen.vocab_size, stream=stream)}
    return {}


def _directions(observations: Mapping[str, Observation]) -> dict[str, Observation]:
    return {
        name: dataclasses.replace(
            seen, features={"directions": dataclasses.replace(directions, counts=None)}
        )
        for name, seen in observations.items()
        if (directions := seen.features.get("directions")) is not None
        and directions.thresholds[:, ~directions.too_few].isfinite().all()
    }


def _turned(
    rows: Float[Tensor, "layer batch sampled feature"],
) -> Float[Tensor, "layer batch sampled turned"]:
    """The same tokens seen from their mean, in at most as many dimensions as there are tokens."""
    tokens = rearrange(rows, "layer batch sampled feature -> layer (batch sampled) feature")
    centred = tokens - tokens.mean(1, keepdim=True)
    if tokens.shape[2] > tokens.shape[1]:
        centred = torch.linalg.qr(centred.mT, mode="r").R.mT
    return rearrange(
        centred, "layer (batch sampled) turned -> layer batch sampled turned", batch=rows.shape[1]
    ).clone()
