"""How strongly the end of a series speaks for a change that has just begun, against smooth curves
with autocorrelated noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

WINDOW = 96
"""So many measurements, the latest, are looked at."""

FEWEST_BEFORE = 6
"""A change is claimed only with so many measurements before it."""

LEAST_HEIGHT = 2.5
"""A change is higher than so many standard deviations of the noise."""

_LASTED = (2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 27, 33, 40)
# A rise that goes on, and one that ended midway, need some measurements to be told from a step.
_SLOPED = 4
_CLIP = 2.0
_MOST_RHO = 0.95
# Relative to the values: a spread that their last digits make.
_ROUNDING = 1e-10


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The change for which most speaks.

    Attributes:
        score: of a normal deviate, positive; the largest over onsets and forms, so that it exceeds
            3 by chance much more often than a single one.
        height: with its sign, of the change so far.
        onset: position of its first measurement in the window.
        rho: autocorrelation of the noise, and one standard error more.
    """

    score: float
    height: float
    onset: int
    rho: float


def strongest(
    step: Float[np.ndarray, " measurement"],
    value: Float[np.ndarray, " measurement"],
    stderr: Float[np.ndarray, " measurement"],
    *,
    earliest: int = 0,
) -> Evidence | None:
    """The change for which most speaks, or None where none may be claimed.

    A regression on a smooth curve (line, parabola and a curve that slows down; fewer of them in a
    short series) and one change: a step, a rise that goes on evenly or ever faster, or one that
    ended midway. It has lasted no longer than what was measured before it, and the values have
    moved its way. Noise is an AR(1) whose autocorrelation is estimated with that change left out,
    and corrected for the bias of few measurements (Marriott and Pope 1954). Values that neither
    neighbour shares are clipped, so that it takes two to speak.

    Args:
        step: increasing.
        value: finite.
        stderr: the noise is at least so large; 0 where it is not known.
        earliest: no onset before this position.
    """
    n = len(value)
    lasted = [k for k in _LASTED if n - k >= max(FEWEST_BEFORE, earliest, k)]
    largest = float(np.abs(value).max(initial=0.0))
    if not lasted or largest == 0:
        return None
    # Divided first, so that squares neither overflow nor vanish.
    centre = float(np.median(value))
    spread = float(np.abs(value - centre).max())
    if spread <= _ROUNDING * largest:
        return None
    y = clipped((value - centre) / spread)
    floor = float(np.mean(np.square(stderr / spread))) + (_ROUNDING * largest / spread) ** 2
    x = (step - step[0]) / (step[-1] - step[0])
    smooth = _smooth(x)
    onsets, changes = _changes(x, lasted)

    columns = np.column_stack([smooth, y, changes])
    parts = smooth.shape[1]
    best, _, _ = _fitted(columns, parts, floor)
    left = _residuals(columns, parts, best)
    rho = _autocorrelation(left, parts + 1)
    _, heights, deviates = _fitted(_whitened(columns, rho), parts, floor * (1 - rho**2))
    _, noise = _spread(_whitened(columns, rho), parts, best, floor)
    moved = _moved(y, onsets)
    allowed = (
        (np.sign(moved) == np.sign(heights))
        & (np.abs(moved) >= np.abs(heights) / 2)
        & (np.abs(heights) >= LEAST_HEIGHT * noise / np.sqrt(1 - rho**2))
    )
    if not allowed.any():
        return None
    at = int(np.argmax(np.where(allowed, np.abs(deviates), -1)))
    return Evidence(
        score=float(abs(deviates[at])),
        height=float(heights[at] * spread),
        onset=int(onsets[at]),
        rho=min(rho + float(np.sqrt((1 - rho**2) / n)), _MOST_RHO),
    )


def clipped(value: Float[np.ndarray, " measurement"]) -> Float[np.ndarray, " measurement"]:
    """Values that lie far from the median of themselves and their neighbours are drawn to it."""
    around = np.concatenate([value[:1], value, value[-2:-1]])
    # The last has two before it, and none after.
    around[-1] = value[-2]
    medians = np.median(np.lib.stride_tricks.sliding_window_view(around, 3), axis=1)
    medians[-1] = np.median(value[-3:])
    medians[0] = np.median(value[:3])
    changes = np.diff(value)
    usual = 1.4826 * float(np.median(np.abs(changes - np.median(changes)))) / np.sqrt(2)
    drawn: Float[np.ndarray, " measurement"] = medians + np.clip(
        value - medians, -_CLIP * usual, _CLIP * usual
    )
    return drawn


def _smooth(x: Float[np.ndarray, " measurement"]) -> Float[np.ndarray, "measurement curve"]:
    curves = [np.ones_like(x), x]
    if len(x) >= 16:
        curves.append(x**2)
    if len(x) >= 24:
        curves.append(np.log1p(10 * x))
    return np.column_stack(curves)


def _changes(
    x: Float[np.ndarray, " measurement"], lasted: list[int]
) -> tuple[Int[np.ndarray, " change"], Float[np.ndarray, "measurement change"]]:
    """Curves from 0 to 1 at the end, and where each begins."""
    n = len(x)
    onsets, curves = [], []
    for k in lasted:
        onset = n - k
        since = np.maximum(x - x[onset - 1], 0) / (x[-1] - x[onset - 1])
        curves.append((since > 0).astype(float))
        onsets.append(onset)
        if k >= _SLOPED:
            curves += [since, since**2, np.minimum(2 * since, 1)]
            onsets += [onset, onset, onset]
    return np.array(onsets), np.column_stack(curves)


def _fitted(
    columns: Float[np.ndarray, "measurement column"], parts: int, floor: float
) -> tuple[int, Float[np.ndarray, " change"], Float[np.ndarray, " change"]]:
    """The change that fits best, the height of each, and its deviate from 0."""
    basis = np.linalg.qr(columns[:, :parts])[0]
    rest = columns[:, parts:]
    rest = rest - basis @ (basis.T @ rest)
    y, changes = rest[:, 0], rest[:, 1:]
    own = np.einsum("ij,ij->j", changes, changes)
    own = np.where(own > 1e-9, own, np.inf)
    along = changes.T @ y
    degrees = len(y) - parts - 2
    variance = np.maximum((y @ y - along**2 / own) / degrees, floor)
    t = along / np.sqrt(own * variance)
    # Wallace 1959: the normal deviate that is as improbable.
    deviates = (
        np.sign(t) * (1 - 2 / (8 * degrees + 3)) * np.sqrt(degrees * np.log1p(t**2 / degrees))
    )
    return int(np.argmax(along**2 / own)), along / own, deviates


def _residuals(
    columns: Float[np.ndarray, "measurement column"], parts: int, change: int
) -> Float[np.ndarray, " measurement"]:
    kept = np.column_stack([columns[:, :parts], columns[:, parts + 1 + change]])
    basis = np.linalg.qr(kept)[0]
    y = columns[:, parts]
    left: Float[np.ndarray, " measurement"] = y - basis @ (basis.T @ y)
    return left


def _spread(
    columns: Float[np.ndarray, "measurement column"], parts: int, change: int, floor: float
) -> tuple[Float[np.ndarray, " measurement"], float]:
    left = _residuals(columns, parts, change)
    return left, float(np.sqrt(max(left @ left / (len(left) - parts - 2), floor)))


def _autocorrelation(left: Float[np.ndarray, " measurement"], parts: int) -> float:
    n, squares = len(left), float(left @ left)
    if squares == 0:
        return 0.0
    raw = float(left[1:] @ left[:-1]) / squares
    rho = (raw + parts / n) / (1 - min((parts + 2) / n, 0.5))
    return float(np.clip(rho, 0, _MOST_RHO))


def _whitened(
    columns: Float[np.ndarray, "measurement column"], rho: float
) -> Float[np.ndarray, "measurement column"]:
    first = columns[:1] * np.sqrt(1 - rho**2)
    white: Float[np.ndarray, "measurement column"] = np.concatenate(
        [first, columns[1:] - rho * columns[:-1]]
    )
    return white


def _moved(
    y: Float[np.ndarray, " measurement"], onsets: Int[np.ndarray, " change"]
) -> Float[np.ndarray, " change"]:
    """From just before each onset to now."""
    sums = np.concatenate([[0.0], np.cumsum(y)])
    moved: Float[np.ndarray, " change"] = y[-2:].mean() - (sums[onsets] - sums[onsets - 3]) / 3
    return moved
