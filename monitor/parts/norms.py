"""Norms as the linear maps that they are once the number by which they divide is known.

Of a row x a norm makes γ ⊙ C x / σ + β: C takes the mean off where the norm does, and σ is one
positive number a row, that of the pass at hand. All is in float32 at least.

Shapes: `row` has one number a `feature`; `direction` what is read of such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Beside numbers of this size the small one that norms add to a variance is less than the rounding.
_LARGE, _ROUNDING = 16.0, 1e-6
_SEED = 2


class NotANormError(Exception):
    """What should be a norm is none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearNorm:
    """A norm but for the number by which it divides: its `gain` γ, its `bias` β, and whether it is
    `centred`.
    """

    gain: Float[Tensor, " feature"]
    bias: Float[Tensor, " feature"]
    centred: bool

    @classmethod
    def of(cls, norm: Callable[[Tensor], Tensor], like: Float[Tensor, " feature"]) -> LinearNorm:
        """Reads it off what `norm` makes of rows of the size, kind and place of `like`.

        Raises `NotANormError` where it is no norm, and what `norm` raises.
        """
        random = torch.Generator().manual_seed(_SEED)
        drawn = _LARGE * (1 + torch.randn(4, len(like), generator=random)).to(like)
        signs = _LARGE * torch.ones_like(like)
        signs[1::2] *= -1
        made = norm(torch.stack([*drawn, *(2 * drawn), drawn[0] + 2 * _LARGE, signs, -signs]))
        eps = torch.finfo(like.dtype).eps
        centred = _close(made[8], made[0], eps)
        up, down = precise(made[-2:])
        gain = (up - down) / 2 / _normed(precise(signs), centred=centred)
        bias = (up + down) / 2
        expected = gain * _normed(precise(drawn), centred=centred) + bias
        if not (_close(made[:4], expected, eps) and _close(made[4:8], expected, eps)):
            raise NotANormError("what reads the stream does so through something that is no norm")
        return cls(gain=gain, bias=bias, centred=centred)

    @classmethod
    def none(cls, like: Float[Tensor, " feature"]) -> LinearNorm:
        """What leaves rows as they are."""
        ones = torch.ones_like(precise(like))
        return cls(gain=ones, bias=torch.zeros_like(ones), centred=False)

    def written(self, rows: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        """γ ⊙ C x of every row x: what of it is passed on."""
        return self.gain * _mean_taken_off(precise(rows), take=self.centred)

    def read(
        self, directions: Float[Tensor, "*direction feature"]
    ) -> Float[Tensor, "*direction feature"]:
        """What the products of `directions` with γ ⊙ C x are products of with x itself."""
        return _mean_taken_off(self.gain * directions, take=self.centred)

    def inverse_scale(
        self, given: Float[Tensor, "row feature"], made: Float[Tensor, "row feature"]
    ) -> Float[Tensor, " row"]:
        """1 / σ of every row, from what the norm was given and what it made of it.

        Raises `NotANormError` where what it made is no multiple of γ ⊙ C x, but for β.
        """
        linear, unbiased = self.written(given), precise(made) - self.bias
        inverse = (linear * unbiased).sum(-1) / linear.square().sum(-1).clamp(min=1e-30)
        apart = (unbiased - inverse[:, None] * linear).norm(dim=-1)
        # The numbers that it made are rounded with their bias.
        size = precise(made).norm(dim=-1) + self.bias.norm()
        if bool((apart > torch.finfo(made.dtype).eps ** 0.5 * size).any()):
            raise NotANormError(
                "it makes of the stream something else than a norm does: no multiple of it, "
                "number by number"
            )
        return inverse


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean_taken_off(tensor: Tensor, *, take: bool) -> Tensor:
    return tensor - tensor.mean(-1, keepdim=True) if take else tensor


def _normed(rows: Tensor, *, centred: bool) -> Tensor:
    rows = _mean_taken_off(rows, take=centred)
    return rows / rows.square().mean(-1, keepdim=True).sqrt()


def _close(one: Tensor, other: Tensor, eps: float) -> bool:
    apart = float((one.double() - other.double()).abs().max())
    return apart <= max(8 * eps, _ROUNDING) * float(other.abs().max())
