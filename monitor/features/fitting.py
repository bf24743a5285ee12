"""Finding a direction along which a concept lies, in each of three ways.

Between the class means (diff-in-means); the same with the activations' covariance taken into
account, so that what varies anyway counts less (mass-mean, Marks & Tegmark 2023: the direction of
linear discriminant analysis); and by logistic regression.

Shapes: `direction` what is fitted; `feature` of the stream; `token` of a sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor

# Of the mean squared weight, on features of unit variance. Few tokens in many dimensions can always
# be told apart: what is learnt of them then is mostly noise.
PENALTY = 0.1

_MOST_STEPS = 1000
_CONVERGED = 1e-4


class Moments:
    """Mean and covariance of rows that come in parts, around the mean of the first part, so that a
    mean that is large beside the variance costs no digits.
    """

    def __init__(self, first: Float[Tensor, "token feature"]) -> None:
        features = first.shape[1]
        self._origin = first.mean(0)
        self._sum = first.new_zeros(features)
        self._products = first.new_zeros(features, features)
        self.count = 0

    def add(self, rows: Float[Tensor, "token feature"]) -> None:
        """Takes some rows."""
        away = rows - self._origin
        self._sum += away.sum(0)
        self._products.addmm_(away.T, away)
        self.count += len(rows)

    def covariance(self) -> Float[Tensor, "feature feature"]:
        """Around the mean."""
        mean = self._sum / self.count
        return self._products / self.count - mean[:, None] * mean

    def __add__(self, other: Moments) -> Moments:
        """The moments of the rows of both."""
        both = Moments(self._origin[None])
        apart = other._origin - self._origin
        crossed = apart[:, None] * other._sum
        both._sum = self._sum + other._sum + other.count * apart
        both._products = (
            self._products
            + other._products
            + crossed
            + crossed.T
            + other.count * apart[:, None] * apart
        )
        both.count = self.count + other.count
        return both


def shrunk(
    covariance: Float[Tensor, "feature feature"], count: int
) -> Float[Tensor, "feature feature"]:
    """A covariance of `count` samples, nearer to a multiple of the identity by as much as is best
    for normal data (OAS, Chen et al. 2010): it can be inverted however few they are.

    >>> few = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> shrunk(few, 1)
    tensor([[1., 0.],
            [0., 1.]])
    """
    features = len(covariance)
    level = covariance.diagonal().mean()
    squares = covariance.square().mean()
    above = squares + level**2
    below = (count + 1) * (squares - level**2 / features)
    share = 1.0 if float(below) <= 0 else min(1.0, float(above / below))
    return (1 - share) * covariance + share * level * torch.eye(features).to(covariance)


def mass_means(
    differences: Float[Tensor, "direction feature"],
    covariance: Float[Tensor, "feature feature"],
    count: int,
) -> Float[Tensor, "direction feature"]:
    """The differences of class means times the inverse of the shrunk covariance. NaN where that
    is not finite.
    """
    return torch.cholesky_solve(differences.T, _factor(shrunk(covariance, count))).T


def noise_dimensions(
    covariance: Float[Tensor, "feature feature"], count: int
) -> Float[Tensor, " method"]:
    """Over how many dimensions the direction is spread that each method finds where labels mean
    nothing: the participation ratio of its covariance, so that two such directions have a mean
    squared cosine of 1 over that; or somewhat less, where a few dimensions have most of it.

    The difference of two means that are none has the covariance of tokens but for a factor; and
    logistic regression, whose weights are then small, takes one step towards its optimum.
    """
    spread = covariance.diagonal().clamp(min=0).sqrt()
    scale = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
    alike = covariance * scale * scale[:, None]
    bends = _factor(alike / 4 + PENALTY * torch.eye(len(alike)).to(alike))
    tame = _factor(shrunk(covariance, count))
    turned = torch.cholesky_solve(torch.cholesky_solve(alike, bends).mT, bends)
    found = torch.stack(
        [
            covariance,
            torch.cholesky_solve(torch.cholesky_solve(covariance, tame).mT, tame),
            turned * scale * scale[:, None],
        ]
    )
    # Squares of large numbers, or of small ones, would have no place in float32.
    found = found / found.abs().amax((1, 2), keepdim=True).clamp(min=1e-30)
    return found.diagonal(dim1=1, dim2=2).sum(1).square() / found.square().sum((1, 2))


def _factor(matrix: Float[Tensor, "feature feature"]) -> Float[Tensor, "feature feature"]:
    """The lower Cholesky factor; NaN where there is none."""
    # Features that never vary, as zeros that training has not touched yet, have nothing to invert.
    floor = torch.finfo(matrix.dtype).eps * matrix.diagonal().mean().clamp(min=1e-30)
    floored = matrix + floor * torch.eye(len(matrix)).to(matrix)
    factor, failed = torch.linalg.cholesky_ex(floored)
    return torch.where(failed == 0, factor, torch.nan)


def logistic(
    rows: Float[Tensor, "token feature"], labels: Int8[Tensor, "direction token"]
) -> tuple[Float[Tensor, "direction feature"], Float[Tensor, " direction"]]:
    """Weights and intercepts that tell tokens labelled 1 from those labelled -1, all directions at
    once; the least mean loss, with half of `PENALTY` times the squared weights of features scaled
    to unit variance. NaN where it was not found.

    Found by steps to the least of a parabola that lies above the loss, the same for all directions
    (Böhning & Lindsay 1988), accelerated as by Nesterov, and anew where that leads uphill
    (O'Donoghue & Candès 2015).
    """
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(spread > 0, 1 / spread, torch.zeros_like(spread))
    scaled = (rows - mean) * scale
    # The intercept is one more weight, penalised as little as does not matter.
    inputs = F.pad(scaled, (0, 1), value=1.0)
    sign = labels.to(rows)
    share = (sign != 0).to(rows)
    share /= share.sum(1, keepdim=True).clamp(min=1)
    penalty = torch.full_like(inputs[0], PENALTY)
    penalty[-1] = 1e-3 * PENALTY
    # No direction's loss bends more than this: it is no further to its least than a step says.
    bends = _factor((inputs.T * share.amax(0)) @ inputs / 4 + penalty.diag())
    weights = inputs.new_zeros(len(labels), inputs.shape[1])
    ahead, age = weights, inputs.new_ones(len(labels), 1)
    for step in range(_MOST_STEPS):
        pull = torch.sigmoid(-sign * (ahead @ inputs.T)) * sign * share
        gradient = penalty * ahead - pull @ inputs
        off = gradient.abs().amax(1)
        # What is not finite will never be.
        if step % 5 == 4 and not bool((off >= _CONVERGED).any()):
            break
        moved = ahead - torch.cholesky_solve(gradient.T, bends).T
        uphill = (gradient * (moved - weights)).sum(1, keepdim=True) > 0
        older = (1 + (1 + 4 * age.square()).sqrt()) / 2
        ahead = moved + torch.where(uphill, 0.0, (age - 1) / older) * (moved - weights)
        weights, age = moved, torch.where(uphill, 1.0, older)
    weights = torch.where(off < _CONVERGED, weights.T, torch.nan).T
    directions = weights[:, :-1] * scale
    return directions, weights[:, -1] - directions @ mean
