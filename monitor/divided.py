"""Weights that are divided between processes, of which none holds them all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

ONLY_A_PART = "every process holds only a part of its weights"
"""Why nothing is told of them."""


def is_whole(parameters: Iterable[Tensor]) -> bool:
    """Whether this process holds all of the weights: none of them is a DTensor."""
    return not any(hasattr(parameter, "placements") for parameter in parameters)
