"""Linear classifiers on the first neuron of a list, the first two, the first four and so on.

Shapes: `probed` what is told apart; `neuron` in the order of the list; `size` how many of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

# Of a neuron's mean square at least this share is variance within the classes: what is less comes
# of rounding, and a neuron that is constant would weigh without bound.
_LEAST_WITHIN = 1e-6


def within_at_least(
    within: Float[Tensor, "*probed neuron"], square: Float[Tensor, "*probed neuron"]
) -> Float[Tensor, "*probed neuron"]:
    """Variances within the classes, held above what rounding leaves of sums of such squares."""
    return torch.maximum(within, _LEAST_WITHIN * square).clamp(min=torch.finfo(within.dtype).tiny)


def discriminants(
    covariance: Float[Tensor, "*probed neuron neuron"],
    difference: Float[Tensor, "*probed neuron"],
    *,
    sizes: Sequence[int],
    tokens: Float[Tensor, "*probed"],
) -> Float[Tensor, "*probed size neuron"]:
    """Weights of the linear discriminant on the first k neurons, for each k of `sizes`: the inverse
    of their covariance within the classes times the difference of the classes' means. Zero for
    the other neurons, and NaN where there is none. Variances must not be 0.

    Neurons are first put on one scale, that of their standard deviation within the classes. Then
    the covariance of k neurons in n tokens is shrunk, by k / (n + k), towards that of uncorrelated
    ones: a neuron's scale decides nothing, and k may come near n.

    >>> covariance = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> many = torch.tensor(1e9)
    >>> discriminants(covariance, torch.tensor([1.0, 1.0]), sizes=(1, 2), tokens=many)
    tensor([[1.0000, 0.0000],
            [1.0000, 0.2500]])
    """
    deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = covariance / deviation.unsqueeze(-1) / deviation.unsqueeze(-2)
    weights = difference.new_zeros(*difference.shape[:-1], len(sizes), difference.shape[-1])
    for place, size in enumerate(sizes):
        shrinkage = (size / (tokens + size))[..., None, None]
        shrunk = (1 - shrinkage) * correlation[..., :size, :size]
        shrunk.diagonal(dim1=-2, dim2=-1).fill_(1)
        scaled = (difference / deviation)[..., :size]
        solved, failed = torch.linalg.solve_ex(shrunk, scaled.unsqueeze(-1))
        solved = solved.squeeze(-1).masked_fill((failed != 0).unsqueeze(-1), float("nan"))
        weights[..., place, :size] = solved / deviation[..., :size]
    return weights
