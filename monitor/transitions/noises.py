"""Noise that a series may have, each as the matrix that whitens it.

Independent; autoregressive, of first and second order; independent on top of what wanders; smooth,
with little on top, which stands for any smooth curve that no formula foresees; and growing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from jaxtyping import Float

_RHOS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.99)
_PAIRS = (
    *((0.5, 0.5), (0.7, 0.5), (0.9, 0.3), (0.9, 0.6)),
    *((0.97, 0.4), (0.97, 0.7), (0.97, 0.9), (0.99, 0.97)),
)
# An autocorrelation, and its share of the variance.
_WANDERS, _SHARES = 0.97, (0.2, 0.5, 0.8)
# Measurements over which a smooth one bends, and the share of what is on top of it.
_BENDS, _ON_TOP = 25, (1e-2, 1e-4, 1e-6, 1e-8)

# Measurements in which its standard deviation grows e-fold, and its autocorrelations.
_GROWING = tuple((grows, rho) for grows in (48, 128) for rho in (0.0, 0.5))

# Subtracted from twice the logarithm of the likelihood: the more a noise could explain, the more.
# Noise that remembers passes for any slow change, of which one that is not told from it would be
# missed. Chosen on simulated series: higher ones find more, and have more false alarms in such
# noise.
_LASTING, _FOR_LASTING = 0.87, 4.0
_FOR_WANDERING, _FOR_BENDING = 7.0, 5.0

CHARGES: Float[np.ndarray, " noise"] = np.concatenate(
    [
        [_FOR_LASTING if rho >= _LASTING else 0.0 for rho in _RHOS],
        np.zeros(len(_PAIRS)),
        np.full(len(_SHARES), _FOR_WANDERING),
        np.full(len(_ON_TOP), _FOR_BENDING),
        np.zeros(len(_GROWING)),
    ]
)
"""What each noise is charged, whether there is a change or not, for all that it could explain."""


@lru_cache(maxsize=1)
def whiteners(n: int) -> Float[np.ndarray, "noise measurement measurement"]:
    """Lower triangular matrices; what each makes of its noise is independent."""
    return np.stack(list(_each(n)))


def _each(n: int) -> Iterator[Float[np.ndarray, "measurement measurement"]]:
    for rho in _RHOS:
        yield _autoregressive(n, rho)
    for slow, fast in _PAIRS:
        yield _autoregressive(n, slow) @ _autoregressive(n, fast)
    apart = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    for share in _SHARES:
        yield _inverted((1 - share) * np.eye(n) + share * _WANDERS**apart)
    for share in _ON_TOP:
        yield _inverted(share * np.eye(n) + np.exp(-0.5 * (apart / _BENDS) ** 2))
    for grows, rho in _GROWING:
        yield _autoregressive(n, rho) * np.exp(-np.arange(n) / grows)


def _autoregressive(n: int, rho: float) -> Float[np.ndarray, "measurement measurement"]:
    each = np.eye(n) - rho * np.eye(n, k=-1)
    each[0, 0] = np.sqrt(1 - rho**2)
    return each


def _inverted(
    covariance: Float[np.ndarray, "measurement measurement"],
) -> Float[np.ndarray, "measurement measurement"]:
    inverse: Float[np.ndarray, "measurement measurement"] = np.linalg.inv(
        np.linalg.cholesky(covariance)
    )
    return np.tril(inverse)
