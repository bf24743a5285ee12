"""A transformer in whose MLP neurons were planted by hand.

Shapes: `batch` sequences of `position` token ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.concept_neurons import ConceptNeurons

# What each of these neurons does; all others read nothing of the concepts.
EVEN, PAIRED, BOTH, NEVER = 3, 5, 7, 9


def even(tokens: Tensor) -> Tensor:
    return 1 - 2 * (tokens % 2)


def paired(tokens: Tensor) -> Tensor:
    """The second bit of an id, which says nothing of the first."""
    return 1 - 2 * (tokens // 2 % 2)


def planted_neurons() -> ConceptNeurons:
    """One neuron is `even`, one `paired`, one is active where both are, one never; the other 36 are
    noise that only tokens decide, and blind to both.
    """
    model = ConceptNeurons(planted=(), signal=50.0)
    ids = torch.arange(len(model.token.weight))
    (block,) = model.blocks
    with torch.no_grad():
        model.token.weight[:, 2] = 50.0 * paired(ids)
        model.token.weight[:, 3] = -50.0 * paired(ids)
        block.attention.norm.weight[:4] = 0
        block.attention.output.weight[:4] = 0
        block.inputs.weight[:, :4] = 0
        block.inputs.weight[EVEN, 0] = 1
        block.inputs.weight[PAIRED, 2] = 1
        block.inputs.weight[BOTH, [0, 2]] = 1
        block.inputs.bias[NEVER] = -1000
    return model
