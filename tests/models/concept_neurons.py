"""A transformer in whose MLP a concept was planted.

Shapes: `batch` sequences of `position` token ids, logits over the `vocabulary`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.hand_built import AttentionBlock, attend_causally


class ConceptNeurons(nn.Module):
    """One block, whose neurons read the token and what attention adds to it. Only those in
    `planted` read the direction in which tokens with the concept (even ids) differ from the others:
    all other neurons, and attention, are blind to it. `signal` is how far a token lies along it,
    beside noise of each neuron's own, of standard deviation about 1.
    """

    def __init__(
        self,
        *,
        planted: tuple[int, ...] = (3,),
        signal: float = 50.0,
        neurons: int = 40,
        vocab_size: int = 96,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList([_Block(width=width, neurons=neurons)])
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    drawn = torch.randn(parameter.shape, generator=random)
                    parameter.copy_(drawn / parameter.shape[1] ** 0.5)
            # The second number keeps what the first says from the layer norm's mean.
            sides = 1 - 2.0 * (torch.arange(vocab_size) % 2)
            self.token.weight.copy_(torch.randn(vocab_size, width, generator=random))
            self.token.weight[:, 0] = signal * sides
            self.token.weight[:, 1] = -signal * sides
            (block,) = self.blocks
            block.attention.norm.weight[:2] = 0
            block.attention.output.weight[:2] = 0
            block.inputs.weight[:, :2] = 0
            block.inputs.weight[list(planted), 0] = 1

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.token(tokens)
        for block in self.blocks:
            residual = block(residual)
        return self.unembedding(residual)


class _Block(nn.Module):
    def __init__(self, *, width: int, neurons: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(width=width, heads=4, attend=attend_causally)
        self.inputs = nn.Linear(width, neurons)
        self.outputs = nn.Linear(neurons, width)
        for linear in (self.inputs, self.outputs):
            nn.init.zeros_(linear.bias)

    def forward(self, residual: Tensor) -> Tensor:
        residual = self.attention(residual)
        return residual + self.outputs(F.relu(self.inputs(residual)))
