"""Slow and obvious versions of what `residual` says, each written out from its definition.

Arrays are float64: `tokens` [token, feature], `rows` [layer, sequence, sampled, feature].
"""

import itertools
import math

import numpy as np


def variances(tokens: np.ndarray) -> np.ndarray:
    """Eigenvalues of the tokens' covariance matrix [feature, feature]."""
    return np.clip(np.linalg.eigvalsh(np.cov(tokens.T)), 0, None)


def participation_ratio(tokens: np.ndarray) -> float:
    spectrum = variances(tokens)
    return spectrum.sum() ** 2 / (spectrum**2).sum()


def effective_rank(tokens: np.ndarray) -> float:
    spectrum = variances(tokens)
    return math.exp(-sum(p * math.log(p) for p in spectrum / spectrum.sum() if p > 0))


def top_share(tokens: np.ndarray) -> float:
    spectrum = variances(tokens)
    return spectrum.max() / spectrum.sum()


def hsic(tokens: np.ndarray, other: np.ndarray) -> float:
    """Mean over all fours of distinct tokens: no token is ever compared with itself."""
    k, v = tokens @ tokens.T, other @ other.T
    fours = list(itertools.permutations(range(len(tokens)), 4))
    return sum(k[i, j] * (v[i, j] + v[q, r] - 2 * v[i, q]) for i, j, q, r in fours) / len(fours)


def cka(tokens: np.ndarray, other: np.ndarray) -> float:
    return hsic(tokens, other) / math.sqrt(hsic(tokens, tokens) * hsic(other, other))


def norm(rows: np.ndarray, layer: int) -> float:
    return float(np.mean([math.sqrt(t @ t) for t in rows[layer].reshape(-1, rows.shape[-1])]))


def anisotropy(rows: np.ndarray, layer: int) -> float:
    """Mean cosine over all pairs of tokens that are not of one sequence."""
    cosines = []
    for one, other in itertools.combinations(rows[layer], 2):
        for a, b in itertools.product(one, other):
            cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
    return float(np.mean(cosines))


def final_share(rows: np.ndarray, layer: int) -> float:
    before = rows[layer - 1] if layer else np.zeros_like(rows[0])
    shares = [
        (after - earlier) @ final / (final @ final)
        for after, earlier, final in zip(
            *(x.reshape(-1, rows.shape[-1]) for x in (rows[layer], before, rows[-1])), strict=True
        )
    ]
    return float(np.mean(shares))


def jackknife(estimate, sequences: np.ndarray) -> float:
    """Standard error of `estimate(sequences)` from leaving each sequence [0] out in turn."""
    count = len(sequences)
    without = [estimate(np.delete(sequences, place, axis=0)) for place in range(count)]
    return math.sqrt((count - 1) * np.var(without))
