"""What the losses on the stimuli say of the use of the context, a number a sequence.

Shapes: `batch` sequences; `prediction` the next token at every position but the last.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def early_and_late(
    text: Float[Tensor, "batch prediction"],
) -> tuple[Float[Tensor, "batch some"], Float[Tensor, "batch some"]]:
    """The losses early in the context (its second sixteenth) and late in it (its last): these hold
    tokens 50 and 500 of 512.
    """
    sixteenth = (text.shape[1] + 1) // 16
    return text[:, sixteenth : 2 * sixteenth], text[:, -sixteenth:]


def late_minus_early(text: Float[Tensor, "batch prediction"]) -> Float[Tensor, " batch"]:
    """The in-context score of Olsson et al. 2022."""
    early, late = early_and_late(text)
    return (late - early).mean(1)


def whole_minus_tail(
    text: Float[Tensor, "batch prediction"], tail: Float[Tensor, "batch tail_prediction"]
) -> Float[Tensor, " batch"]:
    """The loss with the whole context minus that with its last quarter, on the same targets: those
    in the second half of the `tail`, with at least an eighth of the context before each.
    """
    half = (tail.shape[1] + 1) // 2
    return (text[:, -half:] - tail[:, -half:]).mean(1)
