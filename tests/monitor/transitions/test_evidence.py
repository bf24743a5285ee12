"""The score is a Bayes factor, the same as one computed slowly, with covariances and least squares;
and what whitens a noise does so.
"""

import numpy as np
import pytest

from monitor.transitions import evidence, noises
from monitor.transitions.evidence import LEAST_HEIGHT, clipped, strongest
from tests.trajectories import noise, sigmoid


def fitted(columns, y, covariance):
    """Squares that generalised least squares leave, the last coefficient, and -2 times what the
    restricted likelihood has beside squares.
    """
    precision = np.linalg.inv(covariance)
    gram = columns.T @ precision @ columns
    coefficients = np.linalg.solve(gram, columns.T @ precision @ y)
    left = y - columns @ coefficients
    beside = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(gram)[1]
    return left @ precision @ left, coefficients[-1], beside


def found_in(value, *, least=0.0):
    n = len(value)
    errors, earliest = np.zeros((n, 1)), np.zeros(1, dtype=int)
    return strongest(np.arange(float(n)), value[:, None], errors, earliest, np.array([least]))


def slowly(value):
    """The score of one series of even steps, measurement by measurement as `strongest` has it."""
    n = len(value)
    raw = value - np.median(value)
    y = clipped(raw[:, None])[:, 0]
    alone = evidence._loners(raw[:, None], y[:, None])[0]
    smooth = np.linalg.qr(np.vander(np.linspace(0, 1, n), 3))[0]
    onsets, changes = evidence._changes(n)
    free = n - 3
    without, with_change = [], []
    for whitener, charge in zip(noises.whiteners(n), noises.CHARGES, strict=True):
        covariance = np.linalg.inv(whitener.T @ whitener)
        # What some measurements do alone is noise that is not in the values.
        added = alone * np.square(whitener).sum()
        squares, _, beside = fitted(smooth, y, covariance)
        squares += added
        without.append(squares ** (-free / 2) * np.exp(-(beside + charge) / 2))
        for onset, change in zip(onsets, changes.T, strict=True):
            both = np.column_stack([smooth, change])
            squares, height, _ = fitted(both, y, covariance)
            squares += added
            white, *_ = fitted(both, y, np.eye(n))
            moved = y[-2:].mean() - y[onset - 3 : onset].mean()
            if (
                moved * height > 0
                and abs(moved) >= abs(height) / 2
                and abs(height) >= LEAST_HEIGHT * np.sqrt((white + n * alone) / (free - 1))
            ):
                with_change.append(squares ** (-free / 2) * np.exp(-(beside + charge) / 2))
    degrees = free - 1
    normal = (1 - 2 / (8 * degrees + 3)) * np.sqrt(degrees / free)
    return normal * np.sqrt(max(2 * np.log(sum(with_change) / sum(without)), 0))


@pytest.mark.parametrize("of", ["white", "ar0.5", "ar0.9"])
def test_the_score_is_that_of_slow_least_squares(of):
    n = 30
    value = noise(of, n, np.random.default_rng(7))
    value += sigmoid(n, midpoint=25, width=4, height=10)
    found = found_in(value)
    assert found.score[0] == pytest.approx(slowly(value), rel=1e-6)
    assert found.score[0] > 0
    assert 18 <= found.onset[0] <= 27
    assert found.height[0] > 0


def test_what_is_lower_than_matters_is_no_change():
    value = noise("white", 40, np.random.default_rng(7)) + sigmoid(
        40, midpoint=33, width=2, height=10
    )
    found = found_in(value)
    assert found_in(value, least=5.0).score[0] == pytest.approx(found.score[0], rel=0.05)
    assert found_in(value, least=20.0).score[0] == 0
    # In the unit of the values, whatever that is.
    assert found_in(1e-6 * value, least=5e-6).score[0] == pytest.approx(found.score[0], rel=0.05)
    assert found_in(1e-6 * value, least=2e-5).score[0] == 0


def test_what_whitens_first_measurements_does_not_depend_on_later_ones():
    whole = noises.whiteners(40)
    for n in (8, 23):
        for first, alone in zip(whole[:, :n, :n], noises._each(n), strict=True):
            # The smoothest has hardly more than rounding on top.
            assert np.allclose(first, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.96])
def test_autoregressive_noise_is_whitened(rho):
    apart = np.abs(np.subtract.outer(np.arange(20), np.arange(20)))
    whitener = noises.whiteners(20)[noises._RHOS.index(rho)]
    # Of a variance that does not depend on the measurement.
    made = whitener @ rho**apart @ whitener.T
    assert np.allclose(made, (1 - rho**2) * np.eye(20))
