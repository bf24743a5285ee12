"""Which rises and falls of a series are transitions.

Proposals come from a scan over midpoints and widths. One is declared where its BIC beats every
smooth curve's, with autocorrelated noise allowed to either, where it is higher than `DEVIATIONS`
standard deviations of the noise, and narrower than `WIDEST` of the series.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from monitor.transitions.curves import smooth_bic
from monitor.transitions.rises import Rise, Scan

DEVIATIONS = 5.0
"""A transition is higher than so many standard deviations of the noise."""

WIDEST = 0.5
"""A transition takes less than this share of the series: what is wider is a trend. Chosen on the
recorded trainings: where induction forms, all but one, five times slower, take less, and two of
those where none forms have a rise that takes more."""

LEAST = 1 / 10
"""A transition is at least so high beside the highest of the series: with little noise, what is
lower only mends the form of that one."""

_MOST = 8
# A rise and a fall that undo each other are clear only together.
_UNCLEAR = 3
_ROUNDS = 2
# Measurements that make a level: fewer are spikes.
_LEVEL = 3
# Parameters of a transition: midpoint, width, height and form.
_EACH = 4


def declared(
    x: Float[np.ndarray, " measurement"],
    y: Float[np.ndarray, " measurement"],
    min_delta_bic: float,
) -> list[tuple[list[Rise], float]]:
    """For each transition its forms, the best first, and its ΔBIC.

    `x` goes from 0 to 1, and `y` has mean 0 and standard deviation 1. One is added after the
    other, each then fitted to what the others leave, until `_UNCLEAR` in a row are not clear; then
    those that do not count are taken out again, the least clear first.
    """
    scan, smooth = Scan(x), smooth_bic(x, y)
    found: list[Rise] = []
    unclear = 0
    while unclear < _UNCLEAR and len(found) < _MOST:
        left = _without(y, found, None)
        added = scan.best(left, calm=True)
        clear = smooth_bic(x, left) - added.bic >= min_delta_bic
        unclear = 0 if clear else unclear + 1
        found = [*found, added]
        for _ in range(_ROUNDS if len(found) > 1 else 0):
            found = _refitted(scan, y, _together(y, found), calm=True)
    while found := _kept(scan, y, _refitted(scan, y, found), smooth, min_delta_bic):
        every = [scan.forms(_without(y, found, which)) for which in range(len(found))]
        best = [forms[0] for forms in every]
        if all(_counts(one, best, x) for one in best):
            return [
                (forms, smooth_bic(x, _without(y, found, which)) - forms[0].bic)
                for which, forms in enumerate(every)
            ]
        found = [one for one in best if _counts(one, best, x)]
    return []


def _kept(
    scan: Scan,
    y: Float[np.ndarray, " measurement"],
    found: list[Rise],
    smooth: float,
    min_delta_bic: float,
) -> list[Rise]:
    """Those that count and are clear; `smooth` is the BIC of the best smooth curve alone."""
    while found:
        deltas = [
            smooth_bic(scan.x, _without(y, found, which)) - one.bic
            for which, one in enumerate(found)
        ]
        failing = [
            which
            for which, delta in enumerate(deltas)
            if delta < min_delta_bic or not _counts(found[which], found, scan.x)
        ]
        # Beside all others even noise that wanders can be made to look clear; all have to pay.
        paid = smooth - min(one.bic for one in found)
        paid -= (len(found) - 1) * _EACH * np.log(len(y))
        if not failing and paid >= min_delta_bic * len(found):
            break
        worst = min(failing or range(len(found)), key=lambda which: deltas[which])
        found = _refitted(scan, y, [*found[:worst], *found[worst + 1 :]])
    return found


def _counts(one: Rise, every: list[Rise], x: Float[np.ndarray, " measurement"]) -> bool:
    """Whether it is high enough, narrow enough, and no part of a higher one."""
    higher = [other for other in every if abs(other.height) > abs(one.height)]
    return (
        abs(one.height) >= DEVIATIONS * one.noise
        and one.width < WIDEST
        and all(abs(one.height) >= LEAST * abs(other.height) for other in higher)
        and not any(_part(one, other, x) for other in higher)
    )


def _part(one: Rise, higher: Rise, x: Float[np.ndarray, " measurement"]) -> bool:
    """Whether it lies in the middle of a higher one, overlaps with one of its own direction, or has
    less than a level between itself and that one.
    """
    own, its = one.numbers(), higher.numbers()
    overlap = own["onset"] < its["end"] and its["onset"] < own["end"]
    along = one.height * higher.height > 0
    between = np.searchsorted(x, [own["midpoint"], its["midpoint"]])
    return bool(
        its["onset"] < own["midpoint"] < its["end"]
        or (along and overlap)
        or abs(between[0] - between[1]) < _LEVEL
    )


def _refitted(
    scan: Scan, y: Float[np.ndarray, " measurement"], found: list[Rise], *, calm: bool = False
) -> list[Rise]:
    """Each fitted to what the others leave, in turn."""
    found = list(found)
    for which in range(len(found)):
        found[which] = scan.best(_without(y, found, which), calm=calm)
    return found


def _together(y: Float[np.ndarray, " measurement"], found: list[Rise]) -> list[Rise]:
    """The heights of all fitted at once, the rest of them as it is."""
    curves = np.stack([np.ones_like(y), *(one.curve for one in found)], axis=1)
    _, *factors = np.linalg.lstsq(curves, y)[0]
    return [
        dataclasses.replace(one, height=one.height * factor, curve=one.curve * factor)
        for one, factor in zip(found, factors, strict=True)
    ]


def _without(
    y: Float[np.ndarray, " measurement"], found: list[Rise], kept: int | None
) -> Float[np.ndarray, " measurement"]:
    """What all of them but one leave."""
    others = [one.curve for which, one in enumerate(found) if which != kept]
    return y - np.sum(others, axis=0) if others else y
