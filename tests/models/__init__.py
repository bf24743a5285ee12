"""Tiny language models for the tests: hand-built, written as known codebases write them, of torch's
own layers, and of Hugging Face's families.
"""

from tests.models.codebases import LitGPT, NanoGPT
from tests.models.hand_built import (
    AttentionBlock,
    AttentionOnly,
    Bigram,
    PlantedInduction,
    attend_by_hand,
    attend_by_sums,
    attend_causally,
    attend_everywhere,
    repeated_at,
    train,
)
from tests.models.hugging_face import (
    CONTEXT,
    FAMILIES,
    HEADS,
    HUGGING_FACE,
    LAYERS,
    VOCABULARY,
    WIDTH,
    gpt2,
    gpt_neox,
    llama,
)
from tests.models.planted import PlantedCircuit
from tests.models.torch_modules import Encoder, MultiheadAttentions

__all__ = [
    "CONTEXT",
    "FAMILIES",
    "HEADS",
    "HUGGING_FACE",
    "LAYERS",
    "VOCABULARY",
    "WIDTH",
    "AttentionBlock",
    "AttentionOnly",
    "Bigram",
    "Encoder",
    "LitGPT",
    "MultiheadAttentions",
    "NanoGPT",
    "PlantedCircuit",
    "PlantedInduction",
    "attend_by_hand",
    "attend_by_sums",
    "attend_causally",
    "attend_everywhere",
    "gpt2",
    "gpt_neox",
    "llama",
    "repeated_at",
    "train",
]
