"""One rise or fall in a series: the form that fits best, and how probable all others are.

The posterior is on a grid over midpoint, width and autocorrelation, with baseline, height and σ
integrated out. The priors are flat in the midpoint, in the logarithm of the width and in the
baseline, and Jeffreys's for the autocorrelation, without which intervals are too narrow where noise
wanders. The forms and the two baselines, a level and a line, count by their BIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from monitor.transitions.curves import BEFORE, RHOS, Design, Fits, Form, powers, rise

Quantity = Literal["onset", "midpoint", "end", "width", "height"]

# Midpoints of the coarse grid, at least and at most, and widths; and both of the finer ones.
_MIDPOINTS = 40, 100
_WIDTHS = 14
_FINE = 24, 16
_ZOOMS = 10
_REFINEMENTS = 3
# Below this place among `RHOS`, noise is hardly autocorrelated.
_CALM = int(np.searchsorted(RHOS, 0.5))
# Of the series: wider, a rise is a line or an exponential.
_WIDEST = 1.5
_NARROW = 0.15
# Below the most probable curve, in nats: what lies further down is not among the draws.
_IMPROBABLE = 12.0
# Numbers that the curves of one form take in long series.
_HELD = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Curves by their midpoints and the logarithms of their widths, `cell` apart in each."""

    midpoints: Float[np.ndarray, " curve"]
    logarithms: Float[np.ndarray, " curve"]
    cell: Float[np.ndarray, " 2"]

    @staticmethod
    def of(
        midpoints: Float[np.ndarray, " midpoint"], logarithms: Float[np.ndarray, " width"]
    ) -> Grid:
        """All pairs."""
        first, second = np.meshgrid(midpoints, logarithms, indexing="ij")
        cell = np.array([np.diff(midpoints).max(), np.diff(logarithms).max()])
        return Grid(midpoints=first.ravel(), logarithms=second.ravel(), cell=cell)

    def curves(
        self, form: Form, x: Float[np.ndarray, " measurement"]
    ) -> Float[np.ndarray, "curve measurement"]:
        """The curves, from 0 to 1."""
        return rise(form, x, self.midpoints, np.exp(self.logarithms))

    def finer(self, grid: Grid, likely: Bool[np.ndarray, " curve"]) -> Grid:
        """A finer grid of what is likely in `grid`, within this one."""
        ranges = [
            np.linspace(
                max(of[likely].min() - cell, whole.min()),
                min(of[likely].max() + cell, whole.max()),
                many,
            )
            for of, whole, cell, many in (
                (grid.midpoints, self.midpoints, grid.cell[0], _FINE[0]),
                (grid.logarithms, self.logarithms, grid.cell[1], _FINE[1]),
            )
        ]
        return Grid.of(*ranges)

    def around(self, at: int) -> Grid:
        """A finer grid around one curve, within this one."""
        near = np.linspace(-1, 1, 7)
        midpoints = self.midpoints[at] + self.cell[0] * near
        logarithms = self.logarithms[at] + self.cell[1] * near
        return Grid.of(
            np.clip(midpoints, self.midpoints.min(), self.midpoints.max()),
            np.clip(logarithms, self.logarithms.min(), self.logarithms.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """One form of a rise on one baseline, in units of the length of the series and its standard
    deviation. A height below 0 is a fall.

    Attributes:
        form: its form.
        bic: of the best curve.
        midpoint: of the best curve, as are width, height and rho.
        width: from 10 to 90 percent.
        height: from 0 to 100 percent.
        rho: autocorrelation of what it leaves.
        curve: the rise alone, without its baseline.
        noise: standard deviation of what the curve and its baseline leave.
        grid: all curves of this form that are not improbable.
        fits: how well each of them fits.
    """

    form: Form
    bic: float
    midpoint: float
    width: float
    height: float
    rho: float
    curve: Float[np.ndarray, " measurement"]
    noise: float
    grid: Grid
    fits: Fits

    def numbers(self) -> dict[Quantity, float]:
        """What the best curve says."""
        quantities = _quantities(self.form, self.midpoint, self.width, self.height)
        return {name: float(number) for name, number in quantities.items()}

    def draws(self, count: int, rng: np.random.Generator) -> dict[Quantity, np.ndarray]:
        """What so many curves say, each drawn with its probability."""
        log_marginal = self.fits.log_marginal()
        weights = np.exp(log_marginal - log_marginal.max()) * _PRIOR
        picked = rng.choice(weights.size, size=count, p=weights.ravel() / weights.sum())
        curve, rho = np.unravel_index(picked, weights.shape)
        aside = rng.uniform(-0.5, 0.5, (2, count))
        return _quantities(
            self.form,
            self.grid.midpoints[curve] + aside[0] * self.grid.cell[0],
            np.exp(self.grid.logarithms[curve] + aside[1] * self.grid.cell[1]),
            self.fits.height[curve, rho]
            + self.fits.scale()[curve, rho] * rng.standard_t(self.fits.degrees, count),
        )


# Jeffreys's prior, times what each of the unevenly spaced autocorrelations stands for.
_PRIOR = np.gradient(RHOS) / np.sqrt(1 - RHOS**2)


class Scan:
    """All rises on one axis, to be tried on any series along it. `x` goes from 0 to 1."""

    def __init__(self, x: Float[np.ndarray, " measurement"]) -> None:
        self.x = x
        many = int(np.clip(_HELD / _WIDTHS / len(x), *_MIDPOINTS))
        # A midpoint has two measurements on either side: with one, an outlier would be a level.
        at = np.linspace(1.5, len(x) - 2.5, min(2 * len(x) - 7, many))
        midpoints = np.interp(at, np.arange(len(x)), x)
        narrowest = np.log(np.diff(x).min() / 2)
        self._grid, self._narrow = (
            Grid.of(midpoints, np.linspace(narrowest, np.log(widest), _WIDTHS))
            for widest in (_WIDEST, _NARROW)
        )
        self._baselines = [powers(x, degree) for degree in (0, 1)]
        self._designs = {
            (form, degree): Design(baseline, curves)
            for form in BEFORE
            for curves in [self._grid.curves(form, x)]
            for degree, baseline in enumerate(self._baselines)
        }
        self._steps: dict[tuple[Form, int], Design] = {
            (form, 0): Design(self._baselines[0], self._narrow.curves(form, x)) for form in BEFORE
        }

    def best(self, y: Float[np.ndarray, " measurement"], *, calm: bool = False) -> Rise:
        """The rise that fits best, its form being the one that does so on a coarse grid.

        `calm` takes noise for hardly autocorrelated, and what it lies on for level, and looks for
        narrow rises only: else several transitions pass for noise that wanders, for a slope, or for
        a wide one.
        """
        designs, rhos = (self._steps, _CALM) if calm else (self._designs, len(RHOS))
        fits = {which: design.fits(y, shape=2) for which, design in designs.items()}
        form, degree = min(fits, key=lambda which: float(fits[which].bic[:, :rhos].min()))
        whole = self._narrow if calm else self._grid
        return self._zoomed(y, form, degree, fits[form, degree], whole=whole, rhos=rhos)

    def forms(self, y: Float[np.ndarray, " measurement"]) -> list[Rise]:
        """Every form on either baseline, the one that fits best first."""
        found = [
            self._zoomed(y, form, degree, design.fits(y, shape=2), whole=self._grid)
            for (form, degree), design in self._designs.items()
        ]
        return sorted(found, key=lambda each: each.bic)

    def _zoomed(
        self,
        y: Float[np.ndarray, " measurement"],
        form: Form,
        degree: int,
        fits: Fits,
        *,
        whole: Grid,
        rhos: int = len(RHOS),
    ) -> Rise:
        """From the coarse grid to ever finer ones of the region that is not improbable."""
        grid, baseline = whole, self._baselines[degree]
        for _ in range(_ZOOMS):
            log_marginal = fits.log_marginal()[:, :rhos].max(axis=1)
            likely = log_marginal > log_marginal.max() - _IMPROBABLE
            finer = whole.finer(grid, likely)
            if finer.cell.prod() > grid.cell.prod() / 2:
                break
            grid = finer
            fits = Design(baseline, grid.curves(form, self.x)).fits(y, shape=2)
        near, best = grid, fits
        for _ in range(_REFINEMENTS):
            near = near.around(int(best.bic[:, :rhos].min(axis=1).argmin()))
            best = Design(baseline, near.curves(form, self.x)).fits(y, shape=2)
        bics = best.bic[:, :rhos]
        at, rho = np.unravel_index(int(bics.argmin()), bics.shape)
        height = float(best.height[at, rho])
        curve = height * near.curves(form, self.x)[at]
        left = y - curve
        left = left - left @ baseline.T @ baseline
        return Rise(
            form=form,
            bic=float(best.bic[at, rho]),
            midpoint=float(near.midpoints[at]),
            width=float(np.exp(near.logarithms[at])),
            height=height,
            rho=float(RHOS[rho]),
            curve=curve,
            noise=float(np.sqrt(np.sum(left**2) / (fits.degrees - 2))),
            grid=grid,
            fits=fits,
        )


def drawn(forms: list[Rise], count: int, rng: np.random.Generator) -> dict[Quantity, np.ndarray]:
    """Draws from all forms, from each as many as its BIC has it."""
    bics = np.array([form.bic for form in forms])
    weights = np.exp(-(bics - bics.min()) / 2)
    counts = rng.multinomial(count, weights / weights.sum())
    draws = [form.draws(int(many), rng) for form, many in zip(forms, counts, strict=True)]
    return {name: np.concatenate([each[name] for each in draws]) for name in draws[0]}


def _quantities(
    form: Form, midpoint: np.ndarray | float, width: np.ndarray | float, height: np.ndarray | float
) -> dict[Quantity, np.ndarray]:
    onset = np.asarray(midpoint - BEFORE[form] * width)
    return {
        "onset": onset,
        "midpoint": np.asarray(midpoint),
        "end": onset + width,
        "width": np.asarray(width),
        "height": np.asarray(height),
    }
