"""Slow and obvious versions of what `geometry` says, from vectors in float64."""

import math

import numpy as np
from scipy.integrate import quad


def cosine(one, other, metric=None):
    metric = np.eye(len(one)) if metric is None else metric
    return one @ metric @ other / math.sqrt((one @ metric @ one) * (other @ metric @ other))


def mean_absolute_cosine(features):
    """Of two random directions, by integration over the sphere."""
    density = lambda c: (1 - c * c) ** ((features - 3) / 2)  # noqa: E731
    return quad(lambda c: c * density(c), 0, 1)[0] / quad(density, 0, 1)[0]


def phi(one, other):
    """Of two lists of labels, where both count."""
    both = [(a, b) for a, b in zip(one, other, strict=True) if a and b]
    return float(np.corrcoef(np.array(both).T)[0, 1])
