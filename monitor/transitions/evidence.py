"""How strongly the end of a series speaks for a change that has just begun, against smooth curves
with autocorrelated noise.

A Bayes factor (Kass & Raftery 1995): how probable a change makes the series, summed over onsets and
forms, over how probable smooth curves alone do, both summed over all noise. So noise that wanders
is not a change, and need not be known beforehand: what was measured before says which it is. The
likelihoods are restricted ones (Harville 1977), for which few measurements do not make noise seem
independent.

All that depends on the steps alone is computed once: many series of the same steps cost little more
than one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

from monitor.transitions.noises import CHARGES, whiteners

WINDOW = 144
"""So many measurements, the latest, are looked at: the longer, the better noise is known."""

FEWEST_BEFORE = 6
"""A change is claimed only with so many measurements before it."""

LEAST_HEIGHT = 2.5
"""A change is higher than so many standard deviations of what is left beside it."""

_LASTED = (2, 3, 4, 5, 6, 8, 10, 12, 15, 18, 22, 27, 33, 40)
# A rise that goes on, and one that ended midway, need some measurements to be told from a step.
_SLOPED = 4
_CLIP, _CLIP_ENDS = 2.0, 1.0
# So many changes from one measurement to the next say which is usual.
_DRIFT = 9
# What some measurements do alone, others may do side by side: so many of them are noise, which is
# at least this share of the least of them.
_LONERS, _LONER = 3, 0.5
_BEFORE = 8
"""So many measurements before the onset say from where the change started."""
# Relative to the values: a spread that their last digits make.
_ROUNDING = 1e-10
_TINY = 1e-300
# Of smooth curves and of changes: what has less than this of its own is no curve of its own.
_SAME = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Of each series the change for which most speaks.

    Attributes:
        score: square root of twice the logarithm of the Bayes factor, which would be a normal
            deviate if one change were weighed, with one noise. 0 where no change may be claimed.
        height: with its sign, of the most probable change, so far.
        onset: position of its first measurement in the window.
    """

    score: Float[np.ndarray, " series"]
    height: Float[np.ndarray, " series"]
    onset: Int[np.ndarray, " series"]


def strongest(
    step: Float[np.ndarray, " measurement"],
    value: Float[np.ndarray, "measurement series"],
    stderr: Float[np.ndarray, "measurement series"],
    earliest: Int[np.ndarray, " series"],
    least: Float[np.ndarray, " series"],
) -> Evidence:
    """The change for which most speaks, of each series.

    Smooth curves are, as far as there are measurements enough, a parabola along the steps and one
    along the measurements, both at once. A change is added to them: a step, a rise that goes on
    evenly or ever faster, or one that ended midway. It has lasted no longer than what was measured
    before it, and the values have moved its way. Values that neither neighbour shares are clipped,
    so that it takes two to speak.

    Args:
        step: increasing.
        value: finite.
        stderr: the noise is at least so large; 0 where it is not known.
        earliest: no onset before this position.
        least: no change that is lower.
    """
    n, count = value.shape
    if n < FEWEST_BEFORE + _LASTED[0]:
        return Evidence(
            score=np.zeros(count), height=np.zeros(count), onset=np.zeros(count, dtype=int)
        )
    design = _design(((step - step[0]) / (step[-1] - step[0])).tobytes())
    largest = np.abs(value).max(axis=0)
    largest = np.where(largest > 0, largest, 1.0)
    # Divided first, so that squares neither overflow nor vanish.
    divided = value / largest
    centred = divided - np.median(divided, axis=0)
    spread = np.abs(centred).max(axis=0)
    flat = spread <= _ROUNDING
    spread = np.where(flat, 1.0, spread)
    raw = centred / spread
    y = clipped(raw)

    def scaled(of: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        # Twice, as the product may be too small for a number.
        return of / largest / spread

    floor = np.mean(np.square(scaled(stderr)), axis=0) + (_ROUNDING / spread) ** 2 + _loners(raw, y)

    free = n - design.parts
    whole = design.left(y) + design.sizes[:, None] * floor + _TINY
    along = np.einsum("rjt,ts->rjs", design.towards, y, optimize=True)
    rest = np.maximum(whole[:, None] - along**2, _TINY)
    without = free * np.log(whole) + design.penalty[:, None]
    each = free * np.log(rest) + design.penalty[:, None, None]
    heights = along / design.norms[..., None]
    left = np.sqrt(rest[0] / (free - 1))
    moved = _moved(y, design.onsets)
    allowed = (
        (np.sign(moved) == np.sign(heights))
        & (np.abs(moved) >= np.abs(heights) / 2)
        & (np.abs(heights) >= LEAST_HEIGHT * left)
        & (np.minimum(np.abs(heights), np.abs(moved)) >= scaled(least))
        & (design.onsets[:, None] >= earliest)
        & ~flat
    )
    likeliest = each.min(axis=(0, 1))
    weights = np.where(allowed, np.exp((likeliest - each) / 2), 0)
    of_change = weights.sum(axis=0)
    least = without.min(axis=0)
    odds = of_change.sum(axis=0) / np.exp((least - without) / 2).sum(axis=0)
    gain = np.maximum(least - likeliest + 2 * np.log(np.maximum(odds, _TINY)), 0)
    at, series = of_change.argmax(axis=0), np.arange(count)
    mean = (weights * heights).sum(axis=0) / np.maximum(of_change, _TINY)
    # Wallace 1959: the normal deviate that is as improbable as Student's.
    degrees = free - 1
    normal = (1 - 2 / (8 * degrees + 3)) * np.sqrt(degrees / free)
    return Evidence(
        score=normal * np.sqrt(gain),
        height=mean[at, series] * spread * largest,
        onset=design.onsets[at],
    )


def went_back(
    value: Float[np.ndarray, " measurement"], onset: int, said: int, direction: int
) -> bool:
    """Whether the latest values are nearer to what was before the onset than to what was reached.

    Args:
        value: of the window.
        onset: position at which the change began.
        said: position at which it was first claimed.
        direction: 1 of a rise, -1 of a fall.
    """
    y = clipped(value[:, None])[:, 0] * direction
    before = float(np.median(y[max(onset - _BEFORE, 0) : max(onset, 1)]))
    reached = float(np.median(y[onset : said + 1]))
    return float(np.mean(y[-2:])) < (before + reached) / 2


def clipped(
    value: Float[np.ndarray, "measurement series"],
) -> Float[np.ndarray, "measurement series"]:
    """Values that lie far from the median of themselves and their neighbours are drawn to it.

    The last has no neighbour after it, and the first none before: there it is what the others lead
    to that counts.
    """
    medians = np.empty_like(value)
    medians[1:-1] = np.median(np.stack([value[:-2], value[1:-1], value[2:]]), axis=0)
    for end, inwards in ((-1, value[::-1]), (0, value)):
        medians[end] = _led_to(inwards[: _DRIFT + 1])
    changes = np.diff(value, axis=0)
    usual = 1.4826 * np.median(np.abs(changes - np.median(changes, axis=0)), axis=0) / np.sqrt(2)
    most = np.full((len(value), 1), _CLIP)
    most[[0, -1]] = _CLIP_ENDS
    drawn: Float[np.ndarray, "measurement series"] = medians + np.clip(
        value - medians, -most * usual, most * usual
    )
    return drawn


def _led_to(inwards: Float[np.ndarray, "measurement series"]) -> Float[np.ndarray, " series"]:
    """What the others lead the first one to, evenly or on a bend where there is one, whichever is
    nearer to it.
    """
    changes = -np.diff(inwards, axis=0)[1:]
    change = np.median(changes, axis=0)
    low, high = np.quantile(-np.diff(changes, axis=0), [0.25, 0.75], axis=0)
    # In noise alone bends go either way.
    bend = np.maximum(low, 0) + np.minimum(high, 0)
    evenly = [inwards[0], inwards[1] + change, inwards[2] + 2 * change]
    even = np.median(np.stack(evenly), axis=0)
    bent = inwards[1] + change + (len(changes) + 1) / 2 * bend
    nearer: Float[np.ndarray, " series"] = np.where(
        np.abs(inwards[0] - bent) < np.abs(inwards[0] - even), bent, even
    )
    return nearer


def _loners(
    raw: Float[np.ndarray, "measurement series"], y: Float[np.ndarray, "measurement series"]
) -> Float[np.ndarray, " series"]:
    """The least variance of noise in which some measurements are as far off as these are alone."""
    # Of the last it is not known yet whether others will be there.
    alone = np.sort(np.abs(raw - y)[1:-1], axis=0)
    # Where most stays exactly as it was, one is enough.
    still = np.median(np.abs(np.diff(raw, axis=0)), axis=0) == 0
    variance: Float[np.ndarray, " series"] = np.square(
        _LONER * np.where(still, alone[-1], alone[-_LONERS])
    )
    return variance


@dataclass(frozen=True, slots=True, kw_only=True)
class _Design:
    """What no series changes of the fits.

    Attributes:
        parts: how many smooth curves there are.
        onsets: position of the first measurement of each change.
        white: what whitens each noise.
        smooth: products with values give the coefficients of whitened, orthonormal smooth curves.
        towards: products with values give what each change explains beside them: the square root
            of the squares.
        norms: what a change of height 1 explains.
        sizes: squares that are left of independent noise of variance 1.
        penalty: what -2 times the restricted likelihood has beside squares, and what each noise is
            charged.
    """

    parts: int
    onsets: Int[np.ndarray, " change"]
    white: Float[np.ndarray, "noise measurement measurement"]
    smooth: Float[np.ndarray, "noise part measurement"]
    towards: Float[np.ndarray, "noise change measurement"]
    norms: Float[np.ndarray, "noise change"]
    sizes: Float[np.ndarray, " noise"]
    penalty: Float[np.ndarray, " noise"]

    def left(self, y: Float[np.ndarray, "measurement series"]) -> Float[np.ndarray, "noise series"]:
        """Squares that the smooth curves leave of whitened values."""
        whole = np.square(np.einsum("rut,ts->rus", self.white, y, optimize=True)).sum(axis=1)
        smooth = np.square(np.einsum("rpt,ts->rps", self.smooth, y, optimize=True)).sum(axis=1)
        left: Float[np.ndarray, "noise series"] = np.maximum(whole - smooth, 0)
        return left


@lru_cache(maxsize=4)
def _design(along: bytes) -> _Design:
    """`along` are the bytes of steps between 0 and 1, so that they can be looked up."""
    x = np.frombuffer(along)
    onsets, changes = _changes(len(x))
    # What whitens the first measurements does not depend on those that follow.
    white = np.ascontiguousarray(whiteners(WINDOW)[:, : len(x), : len(x)])
    curves = _smooth(x)
    basis, upper = np.linalg.qr(white @ curves)
    across = basis.transpose(0, 2, 1)
    rest = white @ changes
    rest = rest - basis @ (across @ rest)
    norms = np.sqrt(np.square(rest).sum(axis=1))
    norms = np.where(norms > _SAME, norms, np.inf)
    log_det_curves = np.log(np.abs(np.einsum("rpp->rp", upper))).sum(axis=1)
    log_det_white = np.log(np.einsum("rtt->rt", white)).sum(axis=1)
    return _Design(
        parts=curves.shape[1],
        onsets=onsets,
        white=white,
        smooth=across @ white,
        towards=(rest / norms[:, None]).transpose(0, 2, 1) @ white,
        norms=norms,
        sizes=np.square(white).sum(axis=(1, 2)),
        penalty=2 * (log_det_curves - log_det_white) + CHARGES,
    )


def _smooth(x: Float[np.ndarray, " measurement"]) -> Float[np.ndarray, "measurement part"]:
    """An orthonormal basis of the smooth curves: along the steps, and along the measurements where
    those differ.
    """
    n = len(x)
    even = np.linspace(0, 1, n)
    curves = [np.ones_like(x), x]
    if n >= 16:
        curves += [x**2, even]
    if n >= 24:
        curves.append(even**2)
    left, sizes, _ = np.linalg.svd(np.column_stack(curves), full_matrices=False)
    basis: Float[np.ndarray, "measurement part"] = left[:, sizes > _SAME * sizes[0]]
    return basis


def _changes(
    n: int,
) -> tuple[Int[np.ndarray, " change"], Float[np.ndarray, "measurement change"]]:
    """Curves from 0 to 1 at the end, and where each begins."""
    onsets, curves = [], []
    for lasted in _LASTED:
        onset = n - lasted
        if onset < max(FEWEST_BEFORE, lasted):
            break
        since = np.maximum(np.arange(n) - onset + 1, 0) / lasted
        forms = [(since > 0).astype(float)]
        if lasted >= _SLOPED:
            forms += [since, since**2, np.minimum(2 * since, 1)]
        curves += forms
        onsets += [onset] * len(forms)
    return np.array(onsets), np.column_stack(curves)


def _moved(
    y: Float[np.ndarray, "measurement series"], onsets: Int[np.ndarray, " change"]
) -> Float[np.ndarray, "change series"]:
    """From just before each onset to now."""
    sums = np.concatenate([np.zeros((1, y.shape[1])), np.cumsum(y, axis=0)])
    before = (sums[onsets] - sums[onsets - 3]) / 3
    moved: Float[np.ndarray, "change series"] = y[-2:].mean(axis=0) - before
    return moved
