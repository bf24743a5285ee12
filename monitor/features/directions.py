"""Directions along which concepts lie.

Shapes: `layer` what enters the first block and then what each returns; `concept` what tokens are
labelled with; `method` how a direction was found; `half` of the sequences to fit on; `task` the
concept and its control task.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from monitor.features.scores import Counts

METHODS = ("diff_in_means", "mass_mean", "logistic")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Directions:
    """The directions of each concept after each of the `layers` (-1: before the first block), by
    each of `METHODS`, as long as the method makes them; NaN where there are too few tokens.

    `halves` were found on one half of the fitted sequences each; `counts` say how tokens score
    along directions in sequences that were not fitted, by concept and by control task.
    """

    layers: tuple[int, ...]
    names: tuple[str, ...]
    vectors: Float[Tensor, "layer concept method feature"]
    halves: Float[Tensor, "half layer concept method feature"]
    counts: Counts  # [layer concept method task group side bin]
