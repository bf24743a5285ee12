"""Language models of torch's own layers: `nn.MultiheadAttention` and `nn.TransformerEncoder`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.models.hugging_face import CONTEXT, HEADS, LAYERS, VOCABULARY, WIDTH


class OfTorch(nn.Module):
    """Token and position embeddings, `layers`, and an unembedding."""

    def __init__(self, layers: Callable[[], nn.Module], *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.token = nn.Embedding(VOCABULARY, WIDTH)
            self.position = nn.Embedding(CONTEXT, WIDTH)
            self.layers = layers()
            self.unembedding = nn.Linear(WIDTH, VOCABULARY)
            for name, parameter in self.named_parameters():
                # Attention is then far from uniform.
                if name.endswith("in_proj_weight"):
                    nn.init.normal_(parameter, std=0.4)

    def embed(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        residual = self.token(tokens) + self.position(positions)
        return residual if self.batch_first else residual.transpose(0, 1)

    def unembed(self, residual: Tensor) -> Tensor:
        return self.unembedding(residual if self.batch_first else residual.transpose(0, 1))


class Encoder(OfTorch):
    """`nn.TransformerEncoder` with a causal mask; `hint`: it is told that the mask is causal."""

    def __init__(self, *, norm_first: bool, batch_first: bool = True, hint: bool = True) -> None:
        layer = {"batch_first": batch_first, "norm_first": norm_first}
        super().__init__(
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **layer),
                LAYERS,
                enable_nested_tensor=False,
            ),
            batch_first=batch_first,
        )
        self.hint = hint

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(
            tokens.shape[1], device=tokens.device, dtype=residual.dtype
        )
        return self.unembed(self.layers(residual, mask=mask, is_causal=self.hint or None))


class MultiheadAttentions(OfTorch):
    """Residual layers of bare `nn.MultiheadAttention`, whose weights are asked for or not."""

    def __init__(self, *, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__(
            lambda: nn.ModuleList(
                nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first) for _ in range(LAYERS)
            ),
            batch_first=batch_first,
        )
        self.need_weights = need_weights

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.embed(tokens)
        hidden = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for layer in self.layers:
            mixed, _ = layer(
                residual, residual, residual, attn_mask=hidden, need_weights=self.need_weights
            )
            residual = residual + mixed
        return self.unembed(residual)
