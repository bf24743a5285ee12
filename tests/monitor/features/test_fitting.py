"""Directions fitted in three ways: against scikit-learn, with the same penalty and covariance, and
what noise alone finds against what is said of it.
"""

import math

import pytest
import torch
from sklearn.covariance import OAS, oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from monitor.features.fitting import (
    PENALTY,
    Moments,
    logistic,
    mass_means,
    noise_dimensions,
    shrunk,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(tokens, features, *, seed=0, mean=0.0):
    """Correlated features of different scales."""
    mix = noise(features, features, seed=1) / features**0.5
    scales = torch.arange(1, features + 1) ** -0.7
    return (noise(tokens, features, seed=seed) * scales) @ mix + mean


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("sizes", [[300], [1, 100, 199], [3] * 100])
def test_moments_of_rows_that_come_in_parts(sizes, mean):
    rows = mixed(300, 12, mean=mean)
    parts = rows.split(sizes)
    moments = Moments(parts[0])
    other = Moments(parts[-1])
    for part in parts[:-1] if len(parts) > 1 else parts:
        moments.add(part)
    if len(parts) > 1:
        other.add(parts[-1])
        moments = moments + other
    exact = torch.cov(rows.double().T, correction=0).float()
    assert moments.count == 300
    torch.testing.assert_close(moments.covariance(), exact, rtol=1e-4, atol=1e-4 * exact.max())


@pytest.mark.parametrize(("tokens", "features"), [(500, 10), (40, 40), (20, 80)])
def test_shrinking_and_mass_means_against_scikit_learn(tokens, features):
    rows = mixed(tokens, features)
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows / tokens
    expected, _ = oas(rows.double().numpy())
    found = shrunk(covariance, tokens)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-6)
    differences = noise(3, features, seed=2)
    inverse = torch.linalg.inv(torch.from_numpy(expected))
    exact = (differences.double() @ inverse).float()
    torch.testing.assert_close(
        mass_means(differences, covariance, tokens), exact, rtol=1e-3, atol=1e-3
    )


def test_mass_means_point_where_linear_discriminant_analysis_does():
    """The covariance of all tokens in place of that within classes changes the length alone."""
    apart = noise(12, seed=3)
    side = torch.arange(400) % 2 == 0
    rows = mixed(400, 12) + side[:, None] * apart
    difference = rows[side].mean(0) - rows[~side].mean(0)
    moments = Moments(rows)
    moments.add(rows)
    ours = mass_means(difference[None], moments.covariance(), 10**9)[0]
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(rows.numpy(), side.numpy()).coef_[0]
    cosine = torch.cosine_similarity(ours.double(), torch.from_numpy(theirs).double(), dim=0)
    assert cosine > 0.9999
    # And shrinking is no more than a small turn, with so many tokens.
    tame = mass_means(difference[None], moments.covariance(), 400)[0]
    shrinking = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=OAS())
    theirs = shrinking.fit(rows.numpy(), side.numpy()).coef_[0]
    assert torch.cosine_similarity(tame.double(), torch.from_numpy(theirs).double(), dim=0) > 0.99


@pytest.mark.parametrize(("tokens", "features"), [(400, 10), (60, 120)])
@pytest.mark.parametrize("apart", [0.0, 0.5, 20.0])
def test_logistic_regression_against_scikit_learn(tokens, features, apart):
    labels = torch.randint(-1, 2, (3, tokens), generator=torch.Generator().manual_seed(5))
    labels = labels.to(torch.int8)
    rows = mixed(tokens, features, mean=3.0)
    rows[:, 0] += apart * labels[0]
    rows[:, 1] = 7.0
    weights, intercepts = logistic(rows, labels)
    scale = rows.std(0, correction=0)
    scale[1] = 1.0
    inputs = ((rows - rows.mean(0)) / scale).double().numpy()
    for which in range(3):
        counts = labels[which] != 0
        ridge = LogisticRegression(C=1 / (PENALTY * int(counts.sum())), tol=1e-10, max_iter=10000)
        ridge.fit(inputs[counts.numpy()], (labels[which][counts] > 0).numpy())
        expected = torch.from_numpy(ridge.coef_[0]) / scale
        error = (weights[which] - expected).norm() / expected.norm()
        assert error < 0.01, error
        theirs = ridge.decision_function(inputs)
        ours = rows @ weights[which] + intercepts[which]
        torch.testing.assert_close(ours, torch.from_numpy(theirs).float(), rtol=0.01, atol=0.01)
    assert (weights[:, 1] == 0).all()


def test_directions_do_not_disturb_each_other():
    labels = torch.randint(-1, 2, (4, 90), generator=torch.Generator().manual_seed(6))
    rows = mixed(90, 30)
    together, _ = logistic(rows, labels.to(torch.int8))
    for own, label in zip(together, labels.to(torch.int8), strict=True):
        alone, _ = logistic(rows, label[None])
        assert (own - alone[0]).norm() / own.norm() < 0.01


def test_what_is_not_finite_has_no_direction():
    rows, labels = mixed(50, 6), torch.ones(1, 50, dtype=torch.int8)
    labels[:, ::2] = -1
    rows[3, 2] = math.inf
    weights, _ = logistic(rows, labels)
    assert weights.isnan().all()
    broken = torch.full((6, 6), math.nan)
    assert mass_means(noise(1, 6), broken, 50).isnan().all()
    assert noise_dimensions(broken, 50).isnan().all()
    # What never varies is no error: there is just nothing to find.
    assert mass_means(torch.zeros(1, 6), torch.zeros(6, 6), 50).eq(0).all()


@pytest.mark.parametrize("flat", [True, False])
def test_noise_is_spread_over_as_many_dimensions_as_is_said(flat):
    """Directions of labels that mean nothing, in many samples: 1 / mean squared cosine."""
    features, tokens = 16, 400
    found = []
    for seed in range(120):
        rows = noise(tokens, features, seed=seed) if flat else mixed(tokens, features, seed=seed)
        moments = Moments(rows)
        moments.add(rows)
        side = noise(tokens, seed=1000 + seed) > 0
        difference = (rows[side].mean(0) - rows[~side].mean(0))[None]
        weights, _ = logistic(rows, (2 * side[None].to(torch.int8) - 1))
        whitened = mass_means(difference, moments.covariance(), tokens)
        found.append(torch.cat([difference, whitened, weights]))
    units = torch.nn.functional.normalize(torch.stack(found, dim=1), dim=-1)
    cosines = units @ units.mT
    seen = 120 * 119 / (cosines.square().sum((1, 2)) - 120)
    told = noise_dimensions(moments.covariance(), tokens)
    # Where few dimensions have most of the variance it is a bound.
    assert ((told / seen > 0.7) & (told / seen < 1.15)).all(), (told, seen)
    if flat:
        assert (seen > 14).all()
    else:
        assert seen[0] < 8
