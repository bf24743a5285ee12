"""Norms as the linear maps that they are once the number by which they divide is known.

Of a row x a norm makes γ ⊙ C x / σ + β: C takes the mean off where the norm does, and σ is one
number a row, that of the pass at hand.

Shapes: `row` has one number a `feature`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.parts import Parts
from monitor.streams.reading import UnseenError

# Beside numbers of this size the small one that norms add to a variance is nothing.
_LARGE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearNorm:
    """A norm but for the number by which it divides, in float32; `name` is its path."""

    name: str
    gain: Float[Tensor, " feature"]
    bias: Float[Tensor, " feature"]
    centred: bool

    @classmethod
    def of(cls, parts: Parts, path: str | None, like: Float[Tensor, "... feature"]) -> LinearNorm:
        """Reads the norm at `path` off what it makes of rows of the kind of `like`. None is the
        norm that leaves rows as they are.
        """
        ones = torch.ones_like(like.reshape(-1, like.shape[-1])[0])
        if path is None:
            gain, bias = ones.float(), torch.zeros_like(ones).float()
            return cls(name="no norm", gain=gain, bias=bias, centred=False)
        signs = _LARGE * ones
        signs[1::2] *= -1
        uneven = signs * torch.linspace(0.5, 2, len(ones)).to(signs)
        given = torch.stack([signs, -signs, uneven, uneven + _LARGE])
        up, down, plain, shifted = parts.apply(path, given[None])[0].float()
        apart = float((plain - shifted).abs().max())
        centred = apart <= torch.finfo(like.dtype).eps ** 0.5 * float(plain.abs().max())
        even = signs.float() - signs.float().mean() if centred else signs.float()
        unit = even / even.square().mean().sqrt()
        return cls(name=path, gain=(up - down) / 2 / unit, bias=(up + down) / 2, centred=centred)

    def linear(self, rows: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        """γ ⊙ C x, for every row x."""
        return self.gain * self._centred(rows.float())

    def read(self, directions: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        """What the products of `directions` with γ ⊙ C x are products of with x itself."""
        return self._centred(self.gain * directions)

    def inverse_scale(
        self, given: Float[Tensor, "row feature"], made: Float[Tensor, "row feature"]
    ) -> Float[Tensor, " row"]:
        """1 / σ of every row, from what the norm was given and what it made of it.

        Raises `UnseenError` where what it made is no multiple of γ ⊙ C x, but for β.
        """
        linear, unbiased = self.linear(given), made.float() - self.bias
        inverse = (linear * unbiased).sum(-1) / linear.square().sum(-1).clamp(min=1e-30)
        apart = (unbiased - inverse[:, None] * linear).norm(dim=-1)
        # The numbers that it made are rounded with their bias.
        size = made.float().norm(dim=-1) + self.bias.norm()
        if bool((apart > torch.finfo(made.dtype).eps ** 0.5 * size).any()):
            raise UnseenError(
                f"{self.name} makes of the stream something else than a norm does: no multiple "
                "of it, number by number"
            )
        return inverse

    def _centred(self, rows: Float[Tensor, "*row feature"]) -> Float[Tensor, "*row feature"]:
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows
