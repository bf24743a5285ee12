"""Running a model with some of its attention heads ablated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Which `heads`, as (layer, head), write something else than they would: nothing (`zero`) or
    the mean of what they write over the stimulus (`mean`).

    With `patterns_kept` every head of the model attends as if nothing had been ablated, so that
    only what flows through values is lost.
    """

    heads: tuple[tuple[int, int], ...]
    by: Literal["zero", "mean"]
    patterns_kept: bool = False
