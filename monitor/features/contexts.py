"""The tokens on which units are most active, each with what stands around it.

Shapes: `token` those of some sequences; `unit` whose activations are looked at; `best` in
descending order of activation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.features.collecting import Chunk
from monitor.stimuli import Stimulus

# So many sequences of each unit, at most one token of each.
CONTEXTS = 5

# So many tokens are shown before and after the one that it is about.
_BEFORE, _AFTER = 8, 3

# What stands between two contexts.
SEPARATOR = " | "


class Contexts:
    """Keeps, of each unit, the most active token of each of the sequences in which it is most
    active.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        shape = (units, CONTEXTS)
        self._active = torch.full(shape, -torch.inf, device=device)
        self._row = torch.zeros(shape, dtype=torch.long, device=device)
        self._position = torch.zeros(shape, dtype=torch.long, device=device)

    def add(self, active: Float[Tensor, "token unit"], chunk: Chunk) -> None:
        """Takes the activations of tokens; of a sequence all at once."""
        rows, local = chunk.row.unique(return_inverse=True)
        positions = int(chunk.position.max()) + 1
        shape = (len(rows), positions, active.shape[1])
        placed = torch.full(shape, -torch.inf, device=active.device)
        placed[local.to(active.device), chunk.position.to(active.device)] = active
        highest, position = placed.max(dim=1)
        row = rows.to(active.device)[:, None].expand_as(position)
        every = torch.cat([self._active, highest.T], dim=1)
        # What was seen first stays first of what is equal.
        best = every.argsort(dim=1, descending=True, stable=True)[:, :CONTEXTS]
        self._active = every.gather(1, best)
        self._row = torch.cat([self._row, row.T], dim=1).gather(1, best)
        self._position = torch.cat([self._position, position.T], dim=1).gather(1, best)

    def words(self, stimulus: Stimulus) -> tuple[str, ...]:
        """Of each unit its tokens in their contexts: ids, that of the token in brackets.

        Raises `ValueError` where the stimulus has no labels, and so no lengths.
        """
        if stimulus.labels is None:
            raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
        length = stimulus.labels.length.tolist()

        def context(row: int, position: int) -> str:
            start, stop = max(0, position - _BEFORE), min(length[row], position + _AFTER + 1)
            ids = [str(token) for token in stimulus.tokens[row, start:stop].tolist()]
            ids[position - start] = f"[{ids[position - start]}]"
            return " ".join(ids)

        seen = self._active.isfinite().tolist()
        places = zip(seen, self._row.tolist(), self._position.tolist(), strict=True)
        return tuple(
            SEPARATOR.join(
                context(row, position)
                for there, row, position in zip(*of_unit, strict=True)
                if there
            )
            for of_unit in places
        )
