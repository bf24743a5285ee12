"""Means with their standard errors, where what is independent is the sequence and not the token.

Shapes: `batch` independent sequences; `...` whatever is estimated for each of them.
"""

from __future__ import annotations

from jaxtyping import Float, Num
from torch import Tensor


def pooled_mean(
    total: Float[Tensor, "batch *estimated"], count: Num[Tensor, " batch"]
) -> tuple[Float[Tensor, "*estimated"], Float[Tensor, "*estimated"]]:
    """Mean over all samples of all sequences, and its standard error over sequences.

    `total` sums a sequence's samples and `count` says how many they are. Samples of one sequence
    depend on each other, so the error is that of a ratio of two sums over independent sequences
    (Cochran, Sampling Techniques, 1977, section 6.4); it is NaN for a single sequence.

    >>> import torch
    >>> mean, stderr = pooled_mean(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([1, 1, 2]))
    >>> round(mean.item(), 6), round(stderr.item(), 6)
    (3.0, 0.866025)
    """
    batch = len(total)
    count = count.to(total.dtype).reshape(-1, *[1] * (total.ndim - 1))
    mean = total.sum(0) / count.sum(0)
    residual = total - mean * count
    variance = (
        (residual**2).sum(0) * batch / (batch - 1) if batch > 1 else residual[0] * float("nan")
    )
    return mean, variance.sqrt() / count.sum(0)
