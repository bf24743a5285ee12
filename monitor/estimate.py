"""Means with their standard errors, where what is independent is the sequence and not the token.

Shapes: `batch` independent sequences; `...` whatever is estimated for each of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Num
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


def left_in(batch: int, groups: int = 16) -> Bool[Tensor, "group batch"]:
    """Which sequences remain as each group of neighbours is left out: one each, if they are few.

    >>> left_in(3).int().tolist()
    [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    """
    groups = min(groups, batch)
    group = torch.arange(batch) * groups // batch
    return group != torch.arange(groups)[:, None]


def jackknife_stderr(replicates: Float[Tensor, "group *estimated"]) -> Float[Tensor, "*estimated"]:
    """Standard error of an estimate from its values as each group of sequences is left out.

    It holds for smooth functions of means, and tends to be too large where there are fewer tokens
    than dimensions (Efron & Stein 1981); it is NaN for a single group.

    >>> samples = torch.tensor([1.0, 2.0, 6.0])
    >>> means = torch.stack([samples[kept].mean() for kept in left_in(3)])
    >>> stderr = samples.std() / 3**0.5
    >>> round(jackknife_stderr(means).item(), 6) == round(stderr.item(), 6)
    True
    """
    groups = len(replicates)
    if groups < 2:
        return replicates[0] * float("nan")
    squares = (replicates - replicates.mean(0)).square().sum(0)
    return (squares * (groups - 1) / groups).sqrt()
