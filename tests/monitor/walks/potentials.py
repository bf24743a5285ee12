"""Losses with an answer that is known in advance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Written:
    """A loss that is a function of the weights alone, the same for all items, or with a `noise`
    [item, weight] of its own in each one's slope.
    """

    start: Tensor
    loss: Callable[[Tensor], Tensor]
    noise: Tensor | None = None
    size: int = 1000

    @property
    def items(self) -> int:
        return 1 if self.noise is None else len(self.noise)

    def gradient(self, weights: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        leaf = weights.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = self.loss(leaf)
            (slope,) = torch.autograd.grad(loss, leaf)
        losses = loss.detach().repeat(len(items))
        if self.noise is not None:
            losses = losses + self.noise[items] @ weights
            slope = slope + self.noise[items].mean(0)
        return losses, slope.clone()


def bowl(curvatures: Tensor, *, start: Tensor | None = None, **options) -> Written:
    """½ Σ h w²."""
    return Written(
        start=torch.zeros_like(curvatures) if start is None else start,
        loss=lambda w: (curvatures * w * w).sum() / 2,
        **options,
    )
