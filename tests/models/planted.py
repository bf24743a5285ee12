"""An induction circuit set by hand in the weights of a model whose parts can be found.

Shapes: `batch` sequences of `position` token ids, logits over the `vocabulary`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# So many numbers of the stream that idle heads write and that nothing reads.
_UNREAD = 16


class PlantedCircuit(nn.Module):
    """Layer 0 moves each token one position on, layer 1 looks for the token that it stands at there
    and predicts the token that it finds: an induction circuit of head 0.0 and head 1.0.

    The stream holds one-hot vectors: the token, the position, the token before and the predicted
    token. Position 0 has nothing before it but itself. All bases, of the stream and of each head,
    are turned at random, which changes no score, so that no number is zero everywhere.

    Every other head is idle: it attends and writes, but only where nothing reads. With `decoy` head
    1.1 attends as the induction head does; what it finds it writes there too.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 40,
        context: int = 24,
        sharpness: float = 20.0,
        heads: int = 4,
        decoy: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.context = context
        size = max(vocab_size, context)
        random = torch.Generator().manual_seed(seed)
        token, position, before, predicted, unread = torch.eye(
            3 * vocab_size + context + _UNREAD
        ).split([vocab_size, context, vocab_size, vocab_size, _UNREAD])
        width = token.shape[1]
        turn = _turn(width, random)
        self.token = nn.Embedding(vocab_size, width, _weight=token @ turn)
        self.position = nn.Embedding(context, width, _weight=position @ turn)
        self.blocks = nn.ModuleList(
            _Block(width=width, heads=heads, size=size, sharpness=sharpness) for _ in range(2)
        )
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        idle = 0.1 * torch.randn(2, heads, 3, size, width, generator=random)
        unheard = torch.randn(2, heads, size, _UNREAD, generator=random) @ unread
        # Keys of position 0 alone would be the same for every token, and a key that holds just what
        # the query does could not be told from it: some see a little of the token.
        faint = 0.01 * torch.randn(3, size, vocab_size, generator=random) @ token
        looks = F.pad(position[1:], (0, 0, 0, 1))
        circuit = [
            (looks + faint[0, :context], position + faint[1, :context], token, before),
            (token + faint[2, :vocab_size], before, token, predicted),
        ]
        with torch.no_grad():
            self.unembedding.weight.copy_(sharpness * predicted @ turn)
            for layer, block in enumerate(self.blocks):
                for head in range(heads):
                    planted = (*idle[layer, head], unheard[layer, head])
                    if head == 0:
                        planted = circuit[layer]
                    if decoy and layer == head == 1:
                        planted = (*circuit[1][:3], unheard[1, 1, :vocab_size])
                    bases = _turn(size, random), _turn(size, random)
                    block.plant(head, [matrix @ turn for matrix in planted], *bases)

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            residual = block(residual)
        return self.unembedding(residual)


class _Block(nn.Module):
    def __init__(self, *, width: int, heads: int, size: int, sharpness: float) -> None:
        super().__init__()
        self.heads, self.size, self.sharpness = heads, size, sharpness
        self.inputs = nn.Linear(width, 3 * heads * size, bias=False)
        self.output = nn.Linear(heads * size, width, bias=False)

    def plant(self, head: int, matrices: list[Tensor], pattern: Tensor, value: Tensor) -> None:
        """Sets a head: what its queries, keys and values read, and what its mixed values write, one
        row a number, in the bases `pattern` (of queries and keys) and `value`.
        """
        read = rearrange(self.inputs.weight, "(three h f) w -> three h f w", three=3, h=self.heads)
        wrote = rearrange(self.output.weight, "w (h f) -> h f w", h=self.heads)
        bases = (pattern, pattern, value, value)
        for place, basis, matrix in zip(
            (*read[:, head], wrote[head]), bases, matrices, strict=True
        ):
            place.copy_(basis[:, : len(matrix)] @ matrix)

    def forward(self, residual: Tensor) -> Tensor:
        query, key, value = rearrange(
            self.inputs(residual),
            "batch position (three head feature) -> three batch head position feature",
            three=3,
            head=self.heads,
        )
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.sharpness
        )
        mixed = rearrange(mixed, "batch head position feature -> batch position (head feature)")
        return residual + self.output(mixed)


def _turn(size: int, random: torch.Generator) -> Tensor:
    """A random orthogonal matrix."""
    drawn = torch.randn(size, size, dtype=torch.float64, generator=random)
    return torch.linalg.qr(drawn).Q.float()
