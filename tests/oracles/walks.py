"""Slow and obvious versions of what is said of walks: what a potential gives, by sums over a grid,
and whether walks mix, one pair of draws at a time.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm


def expected(loss: Callable, hot: float, localisation: float, dims: int, reach: float) -> float:
    """nβ E L over the density ∝ exp(−nβ L − γ/2 ‖w‖²), in at most two dimensions."""
    axis = np.linspace(-reach, reach, 4001 if dims == 1 else 2001)
    grid = np.meshgrid(*[axis] * dims, indexing="ij")
    values = hot * loss(*grid)
    weights = np.exp(-values - localisation / 2 * sum(w**2 for w in grid))
    return float((values * weights).sum() / weights.sum())


def split(chains: list[list[float]]) -> list[list[float]]:
    halves = []
    for chain in chains:
        half = len(chain) // 2
        halves += [chain[:half], chain[len(chain) - half :]]
    return halves


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def variance(values: list[float]) -> float:
    return sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1)


def plain_rhat(chains: list[list[float]]) -> float:
    """Equations 1 to 4 of Vehtari et al. 2021."""
    n = len(chains[0])
    between = n * variance([mean(chain) for chain in chains])
    within = mean([variance(chain) for chain in chains])
    return math.sqrt(((n - 1) / n * within + between / n) / within)


def ranked(chains: list[list[float]]) -> list[list[float]]:
    """Equation 14."""
    everything = [value for chain in chains for value in chain]

    def rank(value: float) -> float:
        below = sum(other < value for other in everything)
        same = sum(other == value for other in everything)
        return below + (same + 1) / 2

    size = len(everything)
    return [[norm.ppf((rank(v) - 3 / 8) / (size + 1 / 4)) for v in chain] for chain in chains]


def split_rhat(chains: list[list[float]]) -> float:
    """The larger of that of the draws and that of the folded draws."""
    halves = split(chains)
    everything = sorted(value for half in halves for value in half)
    middle = everything[(len(everything) - 1) // 2]
    folded = [[abs(value - middle) for value in half] for half in halves]
    return max(plain_rhat(ranked(halves)), plain_rhat(ranked(folded)))


def effective_draws(chains: list[list[float]]) -> float:
    """Equations 10 to 13, by Geyer's initial monotone sequence."""
    halves = split(chains)
    n, m = len(halves[0]), len(halves)
    within = mean([variance(half) for half in halves])
    pooled = (n - 1) / n * within + variance([mean(half) for half in halves])

    def like(lag: int) -> float:
        if lag == 0:
            return 1.0
        shared = []
        for half in halves:
            middle = mean(half)
            products = [(half[t] - middle) * (half[t + lag] - middle) for t in range(n - lag)]
            shared.append(sum(products) / (n - 1))
        return 1 - (within - mean(shared)) / pooled

    pairs: list[float] = []
    for lag in range(0, n - 1, 2):
        pair = like(lag) + like(lag + 1)
        if pair < 0:
            break
        pairs.append(min([pair, *pairs[-1:]]))
    return n * m / max(2 * sum(pairs) - 1, 1 / math.log10(n * m))
