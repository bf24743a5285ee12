"""Dimensionality and interference of directions: polytopes, random directions, and the toy models
of superposition (Elhage et al. 2022), whose optima are known.
"""

import math

import pytest
import torch

from monitor.features.superposition import (
    feature_dimensionality,
    interference,
    square_cosines,
)
from tests.models.toy_superposition import ToyModel, every_input, trained


def polygon(corners: int) -> torch.Tensor:
    angle = torch.arange(corners) * 2 * math.pi / corners
    return torch.stack([angle.cos(), angle.sin()], dim=1)


TETRAHEDRON = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


@pytest.mark.parametrize(
    ("directions", "share"),
    [
        (torch.tensor([[2.0], [-2.0]]), 1 / 2),
        (polygon(3), 2 / 3),
        (polygon(5), 2 / 5),
        (TETRAHEDRON, 3 / 4),
        (3 * torch.eye(4), 1.0),
        (torch.zeros(3, 5), 0.0),
    ],
    ids=["pair", "triangle", "pentagon", "tetrahedron", "orthogonal", "zero"],
)
def test_polytopes(directions, share):
    told = feature_dimensionality(directions)
    assert told.dtype == directions.dtype
    torch.testing.assert_close(told, torch.full_like(told, share))
    # Orthogonal sums of polytopes, turned and scaled, are told apart.
    both = torch.block_diag(1e-3 * directions, 1e3 * torch.eye(2)).double()
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(both.T), len(both.T), generator=random, dtype=torch.float64)
    turned = feature_dimensionality(both @ torch.linalg.qr(drawn).Q)
    torch.testing.assert_close(turned, torch.cat([told, torch.ones(2)]).double())


def written_out(directions: torch.Tensor) -> list[tuple[float, float, float]]:
    """Slow and obvious: dimensionality, interference and mean squared cosine, one at a time."""
    told = []
    for i, own in enumerate(directions.double()):
        unit = own / own.norm()
        along = [float(unit @ other) ** 2 for other in directions.double()]
        others = [j for j in range(len(directions)) if j != i]
        cosines = [along[j] / float(directions[j].double().norm()) ** 2 for j in others]
        share = float(own.norm()) ** 2 / sum(along)
        told.append((share, sum(along[j] for j in others), sum(cosines) / len(others)))
    return told


def test_many_sets_at_once_are_what_each_is_written_out():
    random = torch.Generator().manual_seed(0)
    sets = torch.randn(3, 6, 4, generator=random) * torch.rand(3, 6, 1, generator=random)
    expected = torch.tensor([written_out(one) for one in sets])
    for place, measure in enumerate((feature_dimensionality, interference, square_cosines)):
        torch.testing.assert_close(measure(sets), expected[:, :, place])


def test_the_sum_is_at_most_the_number_of_dimensions():
    random = torch.Generator().manual_seed(1)
    many = torch.randn(50, 200, 7, generator=random)
    assert feature_dimensionality(many).sum(-1).max() <= 7 + 1e-4


def test_a_direction_that_is_not_known_is_not_told_of():
    told = feature_dimensionality(torch.tensor([[1.0, 0.0], [math.nan, 0.0]]))
    assert told.isnan().all()


def test_the_loss_of_the_toy_model_is_the_one_that_is_written_down():
    """An antipodal pair of length 1 errs only where both features are on, by the smaller of them
    in both outputs or, where that is rectified, in one: p²/3 in all. One feature alone leaves the
    variance of the other.
    """
    p = 0.3
    x, chances = every_input(2, p, 64)
    model = ToyModel(n=2, m=1, instances=2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[[1.0], [-1.0]], [[1.0], [0.0]]]))
        model.bias[1, 0, 1] = p / 2
        pair, alone = model.losses(x, chances).tolist()
    assert pair == pytest.approx(p**2 / 3, rel=1e-3)
    assert alone == pytest.approx(p / 3 - p**2 / 4, rel=1e-6)


@pytest.mark.parametrize(("p", "loss"), [(0.5, 0.07628), (0.3, 0.02931), (0.2, 0.01318)])
def test_two_features_in_one_dimension_become_antipodal(p, loss):
    model = ToyModel(n=2, m=1, instances=4)
    losses = trained(model, *every_input(2, p, 64), steps=400, rate=0.03)
    assert losses.min() == pytest.approx(loss, abs=6e-6)
    best = model.weight[losses.argmin()].detach()
    assert feature_dimensionality(best).tolist() == pytest.approx([0.5, 0.5], abs=1e-4)


def test_five_features_in_two_dimensions_become_a_pentagon():
    model = ToyModel(n=5, m=2, instances=8)
    losses = trained(model, *every_input(5, 0.1, 4), steps=600, rate=0.02)
    assert losses.min() == pytest.approx(0.0259, abs=5e-5)
    shares = feature_dimensionality(model.weight[losses.argmin()].detach())
    assert shares.tolist() == pytest.approx([0.4] * 5, abs=1e-3)
    assert float(shares.sum()) == pytest.approx(2.0, abs=1e-3)


def test_dense_features_are_not_put_into_superposition():
    """The impostor: a toy model of the same size whose features are always on."""
    model = ToyModel(n=5, m=2, instances=4)
    losses = trained(model, *every_input(5, 1.0, 4), steps=600, rate=0.02)
    best = feature_dimensionality(model.weight[losses.argmin()].detach())
    assert not torch.allclose(best, torch.full_like(best, 0.4), atol=0.05)
