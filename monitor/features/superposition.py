"""How directions share the dimensions that they lie in (Elhage et al. 2022).

Shapes: `direction` the directions of what is represented, with their lengths: rows of W in a toy
model, differences of means in a transformer; `feature` of the space that they lie in.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def feature_dimensionality(
    directions: Float[Tensor, "*set direction feature"],
) -> Float[Tensor, "*set direction"]:
    """The share of a dimension that each direction W_i has: D_i = ‖W_i‖² / Σ_j(Ŵ_i·W_j)².

    1 for what is orthogonal to all others, less for what is in their way; 0 for a zero vector. The
    sum is at most the number of dimensions.

    >>> import torch
    >>> feature_dimensionality(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    tensor([0.5000, 0.5000, 1.0000, 0.0000])
    """
    squares, along = _along(directions)
    # 0 / 0 where the vector is zero.
    return (squares / along.sum(-1)).where(squares > 0, 0 * squares).to(directions.dtype)


def interference(
    directions: Float[Tensor, "*set direction feature"],
) -> Float[Tensor, "*set direction"]:
    """How much of all others lies along each direction: Σ_{j≠i}(Ŵ_i·W_j)²; 0 for a zero vector.

    >>> import torch
    >>> interference(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]))
    tensor([4., 1., 0.])
    """
    squares, along = _along(directions)
    return (along.sum(-1) - squares).clamp_min(0).to(directions.dtype)


def square_cosines(
    directions: Float[Tensor, "*set direction feature"],
) -> Float[Tensor, "*set direction"]:
    """Mean squared cosine of each direction with the others: 1 over the number of dimensions on
    average between random directions. NaN for a direction that is alone, 0 for a zero vector.

    >>> import torch
    >>> square_cosines(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    lengths = directions.double().norm(dim=-1, keepdim=True)
    _, along = _along(directions / lengths.where(lengths > 0, 1.0))
    others = along.sum(-1) - along.diagonal(dim1=-2, dim2=-1)
    count = directions.new_tensor(directions.shape[-2] - 1).double()
    return (others.clamp_min(0) / count).to(directions.dtype)


def _along(
    directions: Float[Tensor, "*set direction feature"],
) -> tuple[Float[Tensor, "*set direction"], Float[Tensor, "*set direction direction"]]:
    """‖W_i‖², and (Ŵ_i·W_j)² for the pairs; in float64, since lengths are raised to the fourth."""
    exact = directions.double()
    products = exact @ exact.mT
    squares = products.diagonal(dim1=-2, dim2=-1)
    along = products.square() / squares.where(squares > 0, 1.0).unsqueeze(-1)
    return squares, along
