"""The logit lens: what the unembedding would predict from the stream between blocks.

Shapes: `layer` as in a `StreamSample`; `sampled` predictions of each of `batch` sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts import Parts
from monitor.streams.reading import check_readable

# Log-probabilities of this size are held at a time, a few times over.
_LOGIT_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LensSums:
    """Sums over the sampled `predictions` of each sequence: the loss of the actual next token,
    whether the likeliest token is the final layer's, and the divergence of the final layer's
    prediction from this one, KL(final ‖ layer), in nats.

    `chance` holds the same where the next tokens, and the final predictions, are those of the other
    samples of the sequence: the mean over all of them.
    """

    loss: Float[Tensor, "layer batch"]
    agreement: Float[Tensor, "layer batch"]
    kl: Float[Tensor, "layer batch"]
    loss_chance: Float[Tensor, "layer batch"]
    agreement_chance: Float[Tensor, "layer batch"]
    kl_chance: Float[Tensor, "layer batch"]
    predictions: int

    def sequences(self, start: int, stop: int) -> LensSums:
        """The sums of sequences `start` to `stop`."""
        return self._with([self], lambda tensors: tensors[0][:, start:stop])

    @staticmethod
    def join(parts: Sequence[LensSums]) -> LensSums:
        """The sums of a batch that was cut into parts."""
        return parts[0]._with(parts, lambda tensors: torch.cat(tensors, dim=1))

    def _with(
        self, parts: Sequence[LensSums], combine: Callable[[list[Tensor]], Tensor]
    ) -> LensSums:
        names = [field.name for field in dataclasses.fields(self) if field.name != "predictions"]
        combined = {name: combine([getattr(part, name) for part in parts]) for name in names}
        return LensSums(predictions=self.predictions, **combined)


def through_lens(
    parts: Parts,
    rows: Float[Tensor, "layer batch sampled feature"],
    targets: Int[Tensor, "batch sampled"],
) -> LensSums:
    """What is predicted from every layer of the stream; `targets` are the actual next tokens.

    Raises `UnseenError` where final norm or unembedding are not known.
    """
    check_readable(parts)
    layers, batch, sampled, _ = rows.shape
    normed = parts.apply(parts.final_norm, rearrange(rows, "l b s f -> (l b) s f"))
    normed = rearrange(normed, "(l b) s f -> l b s f", l=layers)
    at_once = max(1, _LOGIT_BYTES // (4 * sampled * parts.model.width))
    chunks = [
        _compared(parts, normed[:, start : start + at_once], targets[start : start + at_once])
        for start in range(0, batch, at_once)
    ]
    return LensSums.join(chunks)


def _compared(
    parts: Parts,
    normed: Float[Tensor, "layer batch sampled feature"],
    targets: Int[Tensor, "batch sampled"],
) -> LensSums:
    """Every sampled prediction beside every next token and every final prediction of its sequence:
    those of its own place, and the others for the null.
    """
    final = _log_probabilities(parts, normed[-1])
    probable, likeliest = final.exp(), final.argmax(-1)
    # The same sum as the final layer's cross-entropy below, so that their difference is 0.
    entropy = -_crossed(probable, final).diagonal(dim1=1, dim2=2)
    places: list[Tensor] = []
    for layer, given in enumerate(normed):
        last = layer == len(normed) - 1
        predicted = final if last else _log_probabilities(parts, given)
        every = rearrange(targets, "b other -> b 1 other").expand(-1, predicted.shape[1], -1)
        agrees = predicted.argmax(-1)[:, :, None] == likeliest[:, None, :]
        divergence = -_crossed(probable, predicted) - entropy[:, None, :]
        places.append(torch.stack([-predicted.gather(-1, every), agrees, divergence]))
    # [measure layer batch sampled other]
    pairs = torch.stack(places, dim=1)
    own = pairs.diagonal(dim1=-2, dim2=-1).sum(-1)
    chance = (pairs.sum((-2, -1)) - own) / (pairs.shape[-1] - 1 or float("nan"))
    loss, agreement, kl = own.cpu()
    loss_chance, agreement_chance, kl_chance = chance.cpu()
    return LensSums(
        loss=loss,
        agreement=agreement,
        # A divergence is never below 0 but for rounding.
        kl=kl.clamp(min=0),
        loss_chance=loss_chance,
        agreement_chance=agreement_chance,
        kl_chance=kl_chance,
        predictions=targets.shape[1],
    )


def _log_probabilities(
    parts: Parts, normed: Float[Tensor, "batch sampled feature"]
) -> Float[Tensor, "batch sampled vocabulary"]:
    return parts.unembed(normed).float().log_softmax(-1)


def _crossed(
    probable: Float[Tensor, "batch other vocabulary"],
    predicted: Float[Tensor, "batch sampled vocabulary"],
) -> Float[Tensor, "batch sampled other"]:
    """Σ p log q for every pair of a sequence's predictions."""
    return predicted @ probable.mT
