"""A top-k sparse autoencoder token by token, and activations of which the dictionary is known."""

from __future__ import annotations

import numpy as np
import torch

from monitor.dictionary import SparseAutoencoder


def encoded(sae: SparseAutoencoder, row: np.ndarray) -> dict[int, float]:
    """The latents that fire on one token, and how much."""
    moved = (row - sae.centre.numpy()) / float(sae.scale)
    answers = [
        (float(e @ (moved - sae.bias.numpy()) + b), latent)
        for latent, (e, b) in enumerate(
            zip(sae.encoder.numpy(), sae.encoder_bias.numpy(), strict=True)
        )
    ]
    best = sorted(answers, reverse=True)[: sae.active]
    return {latent: answer for answer, latent in best if answer > 0}


def decoded(sae: SparseAutoencoder, fires: dict[int, float]) -> np.ndarray:
    made = sae.bias.numpy().copy()
    for latent, answer in fires.items():
        made += answer * sae.decoder.numpy()[latent]
    return made * float(sae.scale) + sae.centre.numpy()


def explained(rows: np.ndarray, made: np.ndarray) -> float:
    missed = sum(float(((row - m) ** 2).sum()) for row, m in zip(rows, made, strict=True))
    total = sum(float(((row - rows.mean(0)) ** 2).sum()) for row in rows)
    return 1 - missed / total


def planted(
    *, true: int = 64, features: int = 32, tokens: int = 8192, active: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit directions, and tokens that are each a sum of `active` of them, far from the origin."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(true, features, generator=random)
    directions /= directions.norm(dim=1, keepdim=True)
    which = torch.rand(tokens, true, generator=random).topk(active, dim=1).indices
    amounts = 0.5 + torch.rand(tokens, active, generator=random)
    return directions, torch.zeros(tokens, true).scatter(1, which, amounts) @ directions + 3
