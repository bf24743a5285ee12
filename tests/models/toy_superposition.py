"""Models in which superposition is known: the toy models of Elhage et al. 2022, and a transformer
whose MLP computes the XOR of two directions of its stream.

Shapes: `instance` models that are trained side by side; `n` features in `m` hidden dimensions;
`batch` sequences of `position` token ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tests.models.hand_built import AttentionBlock, attend_causally


class ToyModel(nn.Module):
    """ReLU(WᵀWx + b): `weight` has a direction for each feature, [instance n m]."""

    def __init__(self, *, n: int, m: int, instances: int, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        start = torch.randn(instances, n, m, generator=random, dtype=torch.float64)
        self.weight = nn.Parameter(start * 0.5)
        self.bias = nn.Parameter(torch.zeros(instances, 1, n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight @ self.weight.mT + self.bias).relu()

    def losses(self, x: Tensor, weights: Tensor) -> Tensor:
        """Of each instance, the squared error summed over features, the weighted mean over x."""
        return ((self(x) - x).square().sum(-1) * weights).sum(-1)


def every_input(n: int, probability: float, points: int) -> tuple[Tensor, Tensor]:
    """All inputs with their probabilities: each feature is 0, or uniform in (0, 1) with this
    probability, which Gauss-Legendre points stand for.
    """
    at, weight = np.polynomial.legendre.leggauss(points)
    values = [0.0, *(at + 1) / 2]
    chances = [1 - probability, *(probability * weight / 2)]
    x = torch.tensor(list(itertools.product(values, repeat=n)), dtype=torch.float64)
    each = torch.tensor(list(itertools.product(chances, repeat=n)), dtype=torch.float64)
    return x, each.prod(-1)


def trained(model: ToyModel, x: Tensor, weights: Tensor, *, steps: int, rate: float) -> Tensor:
    """The loss of each instance after training on all inputs at once."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model.losses(x, weights).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return model.losses(x, weights)


# Of the planted transformer: token ids are `_NOISES` × (a + 2b) + which noise.
NOISES = 16
VOCABULARY = 4 * NOISES
_WIDTH, _NEURONS = 16, 24


class PlantedXor(nn.Module):
    """Tokens write two bits, ±1, along two directions of the stream, and one of some noises, each
    as frequent in all four cases. The first two neurons of layer 0 make |a - b| of the bits, for
    nobody to read; all others, all of layer 1 and all attention know only the noise.

    `activation` is that of the MLPs. With `written` the embedding writes the XOR too, and the third
    neuron of layer 0 reads it.
    """

    def __init__(
        self, activation: Callable[[Tensor], Tensor] = torch.relu, *, written: bool = False
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        # What is orthogonal to a vector of ones goes unseen through the mean that a norm takes.
        drawn = torch.randn(_WIDTH, _WIDTH, generator=random)
        drawn[:, 0] = 1.0
        mean, first, second, third, *rest = torch.linalg.qr(drawn).Q.T
        unseen = torch.stack([mean, *rest])

        def noise(count: int, scale: float) -> Tensor:
            return scale * torch.randn(count, len(unseen), generator=random) @ unseen

        a, b = bits(torch.arange(VOCABULARY)).float()[:, :, None]
        table = a * first + b * second + noise(NOISES, 1.0).repeat(4, 1)
        self.token = nn.Embedding(VOCABULARY, _WIDTH)
        self.blocks = nn.ModuleList(_Block(activation) for _ in range(2))
        self.unembedding = nn.Linear(_WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            self.token.weight.copy_(table - a * b * third if written else table)
            self.unembedding.weight.normal_(generator=random)
            for block in self.blocks:
                block.into.weight.copy_(noise(_NEURONS, 0.5))
                block.into.bias.normal_(std=0.1, generator=random)
                block.out.weight.copy_(noise(_NEURONS, 0.1).T)
                block.out.bias.zero_()
                block.attention.inputs.weight.copy_(noise(3 * _WIDTH, 0.3))
                mixes = 0.3 * torch.randn(_WIDTH, _WIDTH, generator=random)
                block.attention.output.weight.copy_(unseen.T @ unseen @ mixes)
            planted = self.blocks[0]
            planted.into.weight[:2] = torch.stack([first - second, second - first])
            planted.into.bias[:2] = 0.0
            planted.out.weight[:, :2] = 0.0
            if written:
                planted.into.weight[2] += third

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.token(tokens)
        for block in self.blocks:
            residual = block(residual)
        return self.unembedding(residual)


class _Block(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = AttentionBlock(width=_WIDTH, heads=2, attend=attend_causally)
        self.into, self.out = nn.Linear(_WIDTH, _NEURONS), nn.Linear(_NEURONS, _WIDTH)
        self.activation = activation

    def forward(self, residual: Tensor) -> Tensor:
        residual = self.attention(residual)
        return residual + self.out(self.activation(self.into(residual)))


def bits(tokens: Tensor) -> Tensor:
    """The two bits of each token of the planted transformer, 1 or -1."""
    case = tokens // NOISES
    return torch.stack([2 * (case % 2) - 1, 2 * (case // 2) - 1]).to(torch.int8)
