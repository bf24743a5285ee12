"""Whether several walks tell of one place, and how much their draws say (Vehtari et al. 2021,
"Rank-normalization, folding, and localization: An improved R̂").

Shapes: `chain` walks of `draw` draws each.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from scipy.stats import norm, rankdata
from torch import Tensor


def split_rhat(draws: Float[Tensor, "chain draw"]) -> float:
    """R̂ of the halves of all chains, after their ranks: the larger of that of the draws, which sees
    chains that are in different places, and that of their distances from the median, which sees
    chains that scatter differently. Near 1 where chains agree with each other and with themselves.

    NaN where draws are not finite, fewer than four, or all the same.

    >>> here = torch.tensor([[0.0, 2.0, 1.0, 3.0, 2.0, 0.0, 3.0, 1.0]] * 2)
    >>> split_rhat(here) < 1.1 < split_rhat(here + torch.tensor([[0.0], [9.0]]))
    True
    """
    if draws.shape[1] < 4 or not draws.isfinite().all():
        return float("nan")
    halves = _halves(draws)
    folded = (halves - halves.median()).abs()
    return max(_rhat(_normal_ranks(halves)), _rhat(_normal_ranks(folded)))


def effective_draws(draws: Float[Tensor, "chain draw"]) -> float:
    """How many independent draws have a mean as uncertain as that of all of these: fewer where a
    draw is like the one before, and where chains are in different places.

    Autocorrelations are added up in pairs as long as those are positive, and none is taken to be
    larger than the pair before (Geyer 1992). NaN where `split_rhat` is.

    >>> effective_draws(torch.arange(20.0)[None]) < 4
    True
    """
    if draws.shape[1] < 4 or not draws.isfinite().all():
        return float("nan")
    halves = _halves(draws)
    chains, length = halves.shape
    within, pooled = _variances(halves)
    if not within:
        return float("nan")
    centred = halves - halves.mean(1, keepdim=True)
    lags = [
        (centred[:, lag:] * centred[:, : length - lag]).sum(1) / length for lag in range(length)
    ]
    # Draws of a chain are as alike as the pooled variance leaves room for.
    like = torch.stack([1 - (within - lag.mean() * length / (length - 1)) / pooled for lag in lags])
    total, before = 0.0, float("inf")
    for at in range(0, length - 1, 2):
        pair = 1 + float(like[1]) if at == 0 else float(like[at] + like[at + 1])
        if pair < 0:
            break
        before = min(before, pair)
        total += before
    # Anticorrelated draws may say more than independent ones, but hardly by much.
    count = chains * length
    return count / max(2 * total - 1, 1 / math.log10(count))


def _halves(draws: Float[Tensor, "chain draw"]) -> Float[Tensor, "half half_draw"]:
    """Each chain as two; of an odd number of draws the one in the middle is left out."""
    half = draws.shape[1] // 2
    return torch.cat([draws[:, :half], draws[:, -half:]]).double()


def _variances(chains: Float[Tensor, "chain draw"]) -> tuple[Tensor, Tensor]:
    """Within chains, and of all draws if chains had begun anywhere."""
    length = chains.shape[1]
    within = chains.var(1).mean()
    between = chains.mean(1).var() if len(chains) > 1 else within * 0
    return within, within * (length - 1) / length + between


def _rhat(chains: Float[Tensor, "chain draw"]) -> float:
    within, pooled = _variances(chains)
    return float((pooled / within).sqrt()) if within else float("nan")


def _normal_ranks(chains: Float[Tensor, "chain draw"]) -> Float[Tensor, "chain draw"]:
    """What is in its place in a normal distribution of as many."""
    ranks = rankdata(chains.numpy().ravel())
    normal = norm.ppf((ranks - 3 / 8) / (len(ranks) + 1 / 4))
    return torch.from_numpy(normal).view_as(chains)
