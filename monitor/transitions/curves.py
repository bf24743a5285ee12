"""Curves fitted to a series whose noise is autocorrelated, and how well each fits.

Every curve is a baseline (a constant, or more powers of x) plus one bend of a given form, times a
height. For noise that follows an AR(1), u'v after whitening is u'(I - ρN + ρ²E)v, where N adds the
two neighbours of each measurement and E leaves out the first and the last: three products of a bend
serve every ρ, so that a grid of thousands of curves is scored at once, without local optima. ρ is
per measurement, however far apart the steps are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Shaped

Form = Literal["logistic", "early", "late"]

# 10, 50 and 90 percent of Gompertz's curve exp(-exp(-z)).
_TENTH, _HALF, _MOST = (float(-np.log(-np.log(share))) for share in (0.1, 0.5, 0.9))
_BEFORE = (_HALF - _TENTH) / (_MOST - _TENTH)

BEFORE: dict[Form, float] = {"logistic": 0.5, "early": _BEFORE, "late": 1 - _BEFORE}
"""Forms of a rise, and which share of its width (10 to 90 percent) lies before its midpoint: the
logistic curve, Gompertz's, which starts abruptly and ends slowly, and its mirror image."""

RHOS: Float[np.ndarray, " rho"] = np.array(
    [-0.4, -0.2, 0, 0.15, 0.3, 0.45, 0.55, 0.65, 0.73, 0.8, 0.85, 0.89, 0.92, 0.945, 0.965, 0.985]
)
"""Autocorrelations that are tried."""

# Of the standard deviation of the series: what rounding and the last digits of a grid leave.
_FLOOR = 1e-7


def rise(
    form: Form,
    x: Shaped[np.ndarray, " measurement"],
    midpoint: Float[np.ndarray, " curve"],
    width: Float[np.ndarray, " curve"],
) -> Float[np.ndarray, "curve measurement"]:
    """Curves from 0 to 1, each with its midpoint, and its width from 10 to 90 percent."""
    z = (x - midpoint[:, None]) / width[:, None]
    curves: Float[np.ndarray, "curve measurement"]
    if form == "logistic":
        # Here, so that who only reads tables need not wait for scipy.
        from scipy.special import expit

        curves = expit(2 * np.log(9) * z)
        return curves
    turned = z if form == "early" else -z
    with np.errstate(over="ignore"):
        gompertz = np.exp(-np.exp(-(_HALF + turned * (_MOST - _TENTH))))
    curves = gompertz if form == "early" else 1 - gompertz
    return curves


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """How well each curve fits at each ρ of `RHOS`, its baseline and height being the best.

    Attributes:
        bic: corrected for few measurements, it counts the baseline, the height, ρ, σ and what the
            shape is chosen by.
        height: of every curve.
        degrees: of freedom of its standard error.
    """

    bic: Float[np.ndarray, "curve rho"]
    height: Float[np.ndarray, "curve rho"]
    degrees: int
    _squares: Float[np.ndarray, "curve rho"]
    _own: Float[np.ndarray, "curve rho"]
    _spread: Float[np.ndarray, "curve rho"]

    def scale(self) -> Float[np.ndarray, "curve rho"]:
        """The standard error of every height."""
        scale: Float[np.ndarray, "curve rho"] = np.sqrt(self._squares / self.degrees / self._own)
        return scale

    def log_marginal(self) -> Float[np.ndarray, "curve rho"]:
        """The logarithm of the likelihood with baseline, height and σ integrated out, up to a
        constant.
        """
        first = np.log1p(-(RHOS**2))
        logs: Float[np.ndarray, "curve rho"] = 0.5 * (
            first - self._spread - self.degrees * np.log(self._squares)
        )
        return logs


def powers(
    x: Float[np.ndarray, " measurement"], degree: int
) -> Float[np.ndarray, "power measurement"]:
    """An orthonormal basis of the polynomials of at most that degree."""
    basis: Float[np.ndarray, "power measurement"] = np.linalg.qr(
        np.vander(2 * x - 1, degree + 1, increasing=True)
    )[0].T
    return basis


class Design:
    """A baseline and bends, each to be fitted together with it: what no series changes of it."""

    def __init__(
        self,
        baseline: Float[np.ndarray, "power measurement"],
        bends: Float[np.ndarray, "curve measurement"],
    ) -> None:
        """The baseline is orthonormal, as `powers` gives it."""
        # Without its part along the baseline a bend stays itself, and loses no digits below.
        self.bends = bends - bends @ baseline.T @ baseline
        self.baseline = baseline
        self._whitened = _whitened(baseline)
        gram = self._whitened @ baseline.T
        self._inverse = np.linalg.inv(gram)
        own = np.stack(
            [
                np.einsum("gt,gt->g", self.bends, self.bends),
                -2 * np.einsum("gt,gt->g", self.bends[:, 1:], self.bends[:, :-1]),
                np.einsum("gt,gt->g", self.bends[:, 1:-1], self.bends[:, 1:-1]),
            ]
        )
        self._across = np.einsum("rit,gt->gri", self._whitened, self.bends, optimize=True)
        self._solved = np.einsum("gri,rij->grj", self._across, self._inverse)
        left = own.T @ _POWERS - (self._solved * self._across).sum(axis=2)
        self._left = np.maximum(left, _TINY)
        # A height is as uncertain beforehand as white noise would leave it: with a flat prior,
        # curves that the series hardly shows would count for most.
        white = np.maximum(own[0], _TINY)[:, None]
        self._spread = np.linalg.slogdet(gram)[1] + np.log(self._left / white)

    def fits(self, y: Float[np.ndarray, " measurement"], *, shape: int) -> Fits:
        """Fits every bend in turn to `y`, whose standard deviation is about 1.

        `shape` counts the parameters that a bend was chosen by.
        """
        n, known = len(y), len(self.baseline)
        whitened = _whitened(y[None])[:, 0]
        towards = whitened @ self.baseline.T
        left = whitened @ y - np.einsum("ri,rij,rj->r", towards, self._inverse, towards)
        with_y = self.bends @ whitened.T - np.einsum("gri,ri->gr", self._solved, towards)
        squares = np.maximum(left - with_y**2 / self._left, 0) + n * _FLOOR**2 * (1 - RHOS**2)
        degrees = n - known - 1
        first = np.log1p(-(RHOS**2))
        free = known + 3 + shape
        # The second term is the one of Akaike's criterion for few measurements, without which eight
        # or ten of them seem to show a transition.
        penalty = free * np.log(n) + 2 * free * (free + 1) / max(n - free - 1, 0.5)
        return Fits(
            bic=n * np.log(squares / n) - first + penalty,
            height=with_y / self._left,
            degrees=degrees,
            _squares=squares,
            _own=self._left,
            _spread=self._spread,
        )


def smooth_bic(x: Float[np.ndarray, " measurement"], y: Float[np.ndarray, " measurement"]) -> float:
    """The lowest BIC of a curve without a transition. `x` goes from 0 to 1.

    These are a constant, a line, a parabola, an exponential in either direction and a logarithm of
    any rate, and a wave of half a cycle to two, which a pair of transitions would else imitate.
    """
    line = powers(x, 1)
    found = [
        Design(line[:1], np.zeros((1, len(x)))).fits(y, shape=-1),
        Design(line[:1], line[1:]).fits(y, shape=0),
        Design(line, powers(x, 2)[2:]).fits(y, shape=0),
    ]
    finest = float(np.log(np.diff(x).min() / 2))
    rates = np.linspace(finest, np.log(_SLOWEST), 40)[None]
    phases = np.stack(np.meshgrid(np.linspace(*_CYCLES, 16), np.linspace(0, 0.5, 12)))
    return min(
        *(float(fits.bic.min()) for fits in found),
        *(_lowest(x, y, family, rates) for family in (_exponential, _mirrored, _logarithm)),
        _lowest(x, y, _wave, phases.reshape(2, -1)),
    )


# What keeps a bend without a part of its own from a division by 0.
_TINY = 1e-12
# Of the length of the series: slower, an exponential is a parabola.
_SLOWEST = 5.0
_CYCLES = 0.5, 2.0
_ZOOMS = 14
_NO_MATTER = 0.01
_POWERS = np.stack([np.ones_like(RHOS), RHOS, RHOS**2])

_Family = Callable[
    [Float[np.ndarray, " measurement"], Float[np.ndarray, "parameter curve"]],
    Float[np.ndarray, "curve measurement"],
]


def _lowest(
    x: Float[np.ndarray, " measurement"],
    y: Float[np.ndarray, " measurement"],
    family: _Family,
    grid: Float[np.ndarray, "parameter curve"],
) -> float:
    """The lowest BIC in a family, from a grid to ever finer ones around the best."""
    level = powers(x, 0)
    around = np.linspace(-1, 1, 9 if len(grid) == 1 else 5)
    steps = np.array([np.diff(np.unique(values))[0] for values in grid])
    finer = around[1] - around[0]
    around_all = np.stack(np.meshgrid(*[around] * len(grid))).reshape(len(grid), -1)
    low, high = grid.min(axis=1), grid.max(axis=1)
    lowest, before = np.inf, np.inf
    for zoom in range(_ZOOMS):
        bics = Design(level, family(x, grid)).fits(y, shape=len(grid)).bic.min(axis=1)
        before, lowest = lowest, min(lowest, float(bics.min()))
        if zoom > 2 and before - lowest < _NO_MATTER:
            break
        best = grid[:, int(bics.argmin())]
        grid = np.clip(best + (steps * around_all.T), low, high).T
        steps = steps * finer
    return lowest


def _exponential(
    x: Float[np.ndarray, " measurement"], logarithms: Float[np.ndarray, "1 curve"]
) -> Float[np.ndarray, "curve measurement"]:
    return np.asarray(np.exp(-x * np.exp(-logarithms.T)))


def _mirrored(
    x: Float[np.ndarray, " measurement"], logarithms: Float[np.ndarray, "1 curve"]
) -> Float[np.ndarray, "curve measurement"]:
    return _exponential(1 - x, logarithms)


def _logarithm(
    x: Float[np.ndarray, " measurement"], logarithms: Float[np.ndarray, "1 curve"]
) -> Float[np.ndarray, "curve measurement"]:
    return np.asarray(np.log1p(x * np.exp(-logarithms.T)))


def _wave(
    x: Float[np.ndarray, " measurement"], phases: Float[np.ndarray, "2 curve"]
) -> Float[np.ndarray, "curve measurement"]:
    cycles, begun = phases[:, :, None]
    return np.asarray(np.cos(2 * np.pi * (cycles * x + begun)))


def _whitened(
    columns: Float[np.ndarray, "column measurement"],
) -> Float[np.ndarray, "rho column measurement"]:
    """Each column times I - ρN + ρ²E."""
    padded = np.pad(columns, ((0, 0), (1, 1)))
    inside = np.pad(columns[:, 1:-1], ((0, 0), (1, 1)))
    rho = RHOS[:, None, None]
    product: Float[np.ndarray, "rho column measurement"] = (
        columns - rho * (padded[:, :-2] + padded[:, 2:]) + rho**2 * inside
    )
    return product
