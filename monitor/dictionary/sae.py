"""A top-k sparse autoencoder (Gao et al. 2024), and its training on activations at hand.

Rows are moved to their geometric median and scaled, so that a number has a variance of about 1; the
encoder finds the `active` latents that answer most, and the decoder's unit rows, times how much
they do, add up to the row. Gradients are written out: nothing of autograd or of torch's optimizers
is touched while somebody else trains.

Shapes: `token` activations of `feature` numbers each, `latent` of the dictionary.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Weiszfeld's iterations to the geometric median, from the mean.
_MEDIAN_ITERATIONS = 8

# The learning rate falls to 0 over this last share of the steps.
_FALLING = 0.25

FEATURES_PER_ACTIVE = 8

# With the seed that a model was drawn with, directions would begin as what was drawn there.
_SALT = 1_646_801_137

# Adam's, as Gao et al. have them.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a sparse autoencoder is trained: `steps` of `batch` tokens each at most, and `seconds` at
    most (None: no clock). A step moves the numbers of a unit vector by about the share `rate` of
    their size. At most `active` latents fire on a token, and no more than one for each
    `FEATURES_PER_ACTIVE` features: with as many as features anything could be written. There are
    four latents a feature, but no more than `most_latents`, and no more than fire `firings` times
    on average on the tokens to train on.
    """

    active: int = 16
    steps: int = 256
    batch: int = 512
    seconds: float | None = 10.0
    rate: float = 0.03
    most_latents: int = 4096
    firings: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("active", "steps", "batch", "most_latents", "firings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected at least 1")

    def latents(self, tokens: int, features: int) -> int:
        """How wide a dictionary of so many tokens and features is.

        >>> Training().latents(4096, 768), Training().latents(1_000_000, 768)
        (1024, 3072)
        """
        active = self.active_of(features)
        fed = active * tokens // self.firings
        return max(active, min(4 * features, self.most_latents, fed))

    def active_of(self, features: int) -> int:
        """How many latents fire on a token of so many features."""
        return max(1, min(self.active, features // FEATURES_PER_ACTIVE))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseAutoencoder:
    """`decoder` rows have unit norm; `bias` is added to what they make, `centre` and `scale` say
    where rows are moved from.
    """

    centre: Float[Tensor, " feature"]
    scale: Float[Tensor, ""]
    encoder: Float[Tensor, "latent feature"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent feature"]
    bias: Float[Tensor, " feature"]
    active: int

    def encode(self, rows: Float[Tensor, "token feature"]) -> Float[Tensor, "token latent"]:
        """How much each latent answers: at most `active` of a row's are above 0."""
        return self._encode(self._moved(rows))

    def decode(self, codes: Float[Tensor, "token latent"]) -> Float[Tensor, "token feature"]:
        """The rows that answers stand for."""
        return (codes @ self.decoder + self.bias) * self.scale + self.centre

    def to(self, device: torch.device) -> SparseAutoencoder:
        """The same on another device, in memory of its own."""
        copied = {name: getattr(self, name).to(device, copy=True) for name in _TENSORS}
        return dataclasses.replace(self, **copied)

    def _moved(self, rows: Tensor) -> Tensor:
        return (rows - self.centre) / self.scale

    def _encode(self, moved: Tensor) -> Tensor:
        answers = torch.addmm(self.encoder_bias, moved - self.bias, self.encoder.T)
        best, which = answers.topk(self.active, dim=1, sorted=False)
        return torch.zeros_like(answers).scatter(1, which, best.relu())

    def gradients(
        self, moved: Float[Tensor, "token feature"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The mean squared distance of moved rows from what is made of them, and its gradients."""
        codes = self._encode(moved)
        error = codes @ self.decoder + self.bias - moved
        loss = error.square().sum() / len(moved)
        towards = error * (2 / len(moved))
        # What was not among the best, or was negative, has no part in it.
        answers = (towards @ self.decoder.T).mul_(codes > 0)
        return loss, {
            "encoder": answers.T @ (moved - self.bias),
            "encoder_bias": answers.sum(0),
            "decoder": codes.T @ towards,
            "bias": towards.sum(0) - answers.sum(0) @ self.encoder,
        }


_LEARNED = ("encoder", "encoder_bias", "decoder", "bias")
_TENSORS = ("centre", "scale", *_LEARNED)


def train(
    rows: Float[Tensor, "token feature"],
    training: Training,
    *,
    start: SparseAutoencoder | None = None,
    stop: int | None = None,
) -> tuple[SparseAutoencoder, int]:
    """A sparse autoencoder of these rows, and the steps that its training took: fewer than asked
    for where the time was up. It goes on from `start`, which is left as it is, where that has the
    same shape, and ends after `stop` steps, as if the time were up. The same rows give the same,
    unless a clock ends it, which it does after one step at the earliest.
    """
    centre = geometric_median(rows)
    scale = (rows - centre).square().mean().sqrt()
    # Rows that are all the same have no scale.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rate = training.rate / rows.shape[1] ** 0.5
    random = torch.Generator().manual_seed(_SALT + training.seed)
    latents = training.latents(*rows.shape)
    if start is None or start.decoder.shape != (latents, rows.shape[1]):
        start = _fresh(rows, latents, training, random)
    learned = start.to(rows.device)
    learned = dataclasses.replace(learned, centre=centre, scale=scale)
    moments = {name: [torch.zeros_like(getattr(learned, name))] * 2 for name in _LEARNED}
    begun, batch = time.perf_counter(), min(training.batch, len(rows))
    left = torch.empty(0, dtype=torch.long)
    for step in range(training.steps):
        if len(left) < batch:
            left = torch.randperm(len(rows), generator=random)
        drawn, left = left[:batch], left[batch:]
        _, gradients = learned.gradients(learned._moved(rows[drawn.to(rows.device)]))
        # Along a row its length alone would change.
        along = (gradients["decoder"] * learned.decoder).sum(1, keepdim=True)
        gradients["decoder"] -= along * learned.decoder
        falling = min(1.0, (training.steps - step) / (_FALLING * training.steps))
        for name, gradient in gradients.items():
            change = _adam(moments[name], gradient, step + 1)
            getattr(learned, name).sub_(change, alpha=rate * falling)
        learned.decoder.div_(learned.decoder.norm(dim=1, keepdim=True))
        late = training.seconds is not None and time.perf_counter() - begun > training.seconds
        if late or step + 1 == stop:
            return learned, step + 1
    return learned, training.steps


def geometric_median(rows: Float[Tensor, "token feature"]) -> Float[Tensor, " feature"]:
    """The point to which the rows' distances are smallest in sum, which a few far rows hardly move.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [2.0], [3.0], [1000.0]])).round()
    tensor([2.])
    """
    point = rows.mean(0)
    for _ in range(_MEDIAN_ITERATIONS):
        distance = (rows - point).norm(dim=1)
        weight = 1 / distance.clamp_min(1e-6 * distance.mean().clamp_min(1e-30))
        point = weight @ rows / weight.sum()
    return point


def _fresh(
    rows: Tensor, latents: int, training: Training, random: torch.Generator
) -> SparseAutoencoder:
    """Random directions, which the encoder reads as the decoder writes them."""
    features = rows.shape[1]
    drawn = torch.randn(latents, features, generator=random).to(rows)
    decoder = drawn / drawn.norm(dim=1, keepdim=True)
    return SparseAutoencoder(
        centre=rows.new_zeros(features),
        scale=rows.new_ones(()),
        encoder=decoder,
        encoder_bias=rows.new_zeros(latents),
        decoder=decoder,
        bias=rows.new_zeros(features),
        active=training.active_of(features),
    )


def _adam(moments: list[Tensor], gradient: Tensor, step: int) -> Tensor:
    """The change that Adam makes of a gradient, for a learning rate of 1."""
    first, second = _BETAS
    moments[0] = torch.lerp(gradient, moments[0], first)
    moments[1] = torch.lerp(gradient.square(), moments[1], second)
    mean, square = moments[0] / (1 - first**step), moments[1] / (1 - second**step)
    return mean / (square.sqrt() + _EPSILON)
