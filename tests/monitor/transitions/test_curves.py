"""The curves that are fitted, and their likelihood against the one of a dense covariance."""

import numpy as np
import pytest
from scipy.linalg import toeplitz
from scipy.stats import multivariate_normal

from monitor.transitions.curves import BEFORE, RHOS, Design, powers, rise, smooth_bic
from tests.trajectories import noise


@pytest.mark.parametrize("form", BEFORE)
def test_a_rise_is_ten_percent_up_at_its_onset_and_ninety_at_its_end(form):
    before = BEFORE[form]
    x = np.array([-50, 3 - 4 * before, 3, 3 + 4 * (1 - before), 50])

    curve = rise(form, x, np.array([3.0]), np.array([4.0]))[0]

    assert np.allclose(curve, [0, 0.1, 0.5, 0.9, 1], atol=1e-4)


def test_the_two_gompertz_curves_mirror_each_other():
    x = np.linspace(-3, 3, 31)
    early = rise("early", x, np.zeros(1), np.ones(1))
    late = rise("late", x, np.zeros(1), np.ones(1))

    assert np.allclose(early, 1 - late[:, ::-1])
    assert BEFORE["early"] < 0.5 < BEFORE["late"]


@pytest.mark.parametrize("degree", [0, 1])
def test_scores_are_those_of_a_dense_covariance(degree):
    n = 40
    rng = np.random.default_rng(3)
    x = np.linspace(0, 1, n)
    curves = rise("logistic", x, np.array([0.3, 0.6]), np.array([0.1, 0.4]))
    y = 2 * curves[1] + noise("ar0.5", n, rng)

    fits = Design(powers(x, degree), curves).fits(y, shape=2)

    for at, curve in enumerate(curves):
        for column, rho in enumerate(RHOS):
            covariance = toeplitz(rho ** np.arange(n)) / (1 - rho**2)
            design = np.column_stack([np.vander(x, degree + 1), curve])
            inverse = np.linalg.inv(covariance)
            gram = design.T @ inverse @ design
            best = np.linalg.solve(gram, design.T @ inverse @ y)
            left = y - design @ best
            variance = left @ inverse @ left / n
            likelihood = multivariate_normal.logpdf(left, cov=variance * covariance)
            free = degree + 1 + 1 + 2 + 2
            penalty = free * np.log(n) + 2 * free * (free + 1) / (n - free - 1)
            bic = -2 * likelihood - n * (np.log(2 * np.pi) + 1) + penalty
            assert fits.bic[at, column] == pytest.approx(bic, abs=1e-5)
            assert fits.height[at, column] == pytest.approx(best[-1], abs=1e-6)
            degrees = n - degree - 2
            error = np.sqrt(variance * n / degrees * np.linalg.inv(gram)[-1, -1])
            assert fits.scale()[at, column] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize(
    "curve",
    [
        lambda x: 0 * x + 0.1,
        lambda x: 3 * x,
        lambda x: x - x**2,
        lambda x: np.exp(-x / 0.13),
        lambda x: np.exp(x / 0.21),
        lambda x: np.log1p(x / 0.01),
        lambda x: np.sin(2 * np.pi * 1.3 * x + 1),
    ],
    ids=["constant", "line", "parabola", "decay", "growth", "logarithm", "wave"],
)
def test_a_smooth_curve_is_fitted_down_to_its_noise(curve):
    n = 120
    x = np.linspace(0, 1, n)
    white = 0.01 * noise("white", n, np.random.default_rng(0))

    bic = smooth_bic(x, curve(x) + white)

    # What the true curve leaves, at the price of at most six parameters.
    true = n * np.log(np.mean((white - white.mean()) ** 2))
    assert true - 20 < bic < true + 6 * np.log(n) + 2
