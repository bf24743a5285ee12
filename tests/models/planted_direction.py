"""A language model in whose stream a concept lies along a known direction.

Shapes: `batch` sequences of `position` token ids, logits over the `vocabulary`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.features import COLLECTORS, Directions, collect
from monitor.labels import Labels
from monitor.parts import Parts, find_parts
from monitor.stimuli import Stimulus, labelled_stimulus
from tests.models.hand_built import AttentionBlock, attend_causally


class PlantedDirection(nn.Module):
    """Token ids that have the concept (even ones) are embedded `strength` further along `planted`
    than the others; beside that embeddings are normal noise, with standard deviations `spread`.

    `planted` lies at `angle` from the first feature towards the second; `mean` is added to all. The
    block adds little, and none of it along these two features.
    """

    def __init__(
        self,
        *,
        strength: float = 2.0,
        angle: float = 0.0,
        spread: Tensor | None = None,
        mean: float = 0.0,
        vocab_size: int = 4096,
        width: int = 24,
        seed: int = 0,
    ) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.planted = torch.zeros(width)
        self.planted[:2] = torch.tensor([math.cos(angle), math.sin(angle)])
        self.token = nn.Embedding(vocab_size, width)
        self.block = nn.ModuleList([AttentionBlock(width=width, heads=2, attend=attend_causally)])
        self.unembedding = nn.Linear(width, vocab_size, bias=False)
        noise = torch.randn(vocab_size, width, generator=random)
        noise = noise if spread is None else noise * spread
        sides = 1 - 2.0 * (torch.arange(vocab_size) % 2)
        with torch.no_grad():
            self.token.weight.copy_(noise + mean + strength / 2 * sides[:, None] * self.planted)
            for parameter in (self.unembedding.weight, *self.block.parameters()):
                if parameter.ndim > 1:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))
            self.block[0].output.weight[:2] = 0

    def forward(self, tokens: Tensor) -> Tensor:
        residual = self.token(tokens)
        for block in self.block:
            residual = block(residual)
        return self.unembedding(residual)


def labelled(
    *,
    rows: int = 32,
    context: int = 33,
    concepts: tuple[str, ...] = ("even", "position", "id"),
    vocab_size: int = 4096,
    source: Tensor | None = None,
    seed: int = 0,
) -> Stimulus:
    """Random token ids: `even` ones have the planted concept, `position` is a side drawn for every
    token on its own, `id` one drawn for each id. A quarter of the sequences each are the halves.
    """
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, context), generator=random)
    of_id = torch.randint(2, (vocab_size,), generator=random)
    sides = {
        "even": tokens % 2 == 0,
        "position": torch.randint(2, tokens.shape, generator=random) == 1,
        "id": of_id[tokens] == 1,
    }
    values = torch.stack([sides[name] for name in concepts]).to(torch.int8) * 2 - 1
    labels = Labels(
        names=concepts,
        values=values * (torch.arange(context) > 0),
        split=torch.tensor([0, 2, 1, 2]).repeat(rows)[:rows],
        length=torch.full((rows,), context),
        source=torch.arange(rows) if source is None else source,
    )
    return labelled_stimulus("concepts", tokens, labels)


def found(model: nn.Module, stimulus: Stimulus, kind: str = "directions") -> Directions:
    """What the collector makes of the model."""
    collected, reasons = collect(_parts(model), stimulus, {kind: COLLECTORS[kind]})
    assert reasons == {}, reasons
    return collected[kind]


@functools.lru_cache(maxsize=2)
def _parts(model: nn.Module) -> Parts:
    return find_parts(find_language_model(model))
