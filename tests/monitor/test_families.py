"""Every kind of model that can be read: what `measure` says of each of its heads, mean, standard
error and null, is what the whole softmax gives. Patterns come from a float64 copy of the model in
which attention is written out, sums over them from plain loops.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from monitor.attention import Pattern, SelfAttention, projected, rows
from monitor.capture import NoAttentionError
from monitor.measure import measure
from monitor.probes import induction
from monitor.stimuli import repeated
from tests.models import (
    FAMILIES,
    VOCABULARY,
    AttentionBlock,
    AttentionOnly,
    Encoder,
    LitGPT,
    MultiheadAttentions,
    NanoGPT,
    attend_by_hand,
    attend_by_sums,
    flex,
)
from tests.models.hugging_face import WINDOW
from tests.oracles import attention as oracle
from tests.oracles import patterns
from tests.oracles.patterns import Shown

CONTEXT, SEQUENCES = 32, 3
STIMULUS = repeated(vocab_size=VOCABULARY, sequences=SEQUENCES, context=CONTEXT, bos=0, seed=0)
TOKENS = STIMULUS.tokens
TEXT = torch.randint(VOCABULARY, (SEQUENCES, CONTEXT), generator=torch.Generator().manual_seed(1))

# Attention is read to this precision; entropies to the second.
SCORES, ENTROPIES = 1e-6, 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the patterns of a model with the same weights and its attention written out."""

    build: Callable[[], nn.Module]
    shown: Callable[[nn.Module, Tensor], Shown]


def hugging_face(kind: str, implementation: str) -> Case:
    family = FAMILIES[kind]

    def shown(model: nn.Module, tokens: Tensor) -> Shown:
        return patterns.of_hugging_face(model, family.build("eager"), tokens, family.windows)

    return Case(build=partial(family.build, implementation), shown=shown)


def hand_built(attend: Callable | None, scores: Callable = patterns.causal) -> Case:
    sizes = {"vocab_size": VOCABULARY, "context": CONTEXT, "width": 32}

    def build() -> nn.Module:
        return spread(AttentionOnly(**sizes, attend=attend))

    return Case(build=build, shown=partial(patterns.of_hand_built, scores=scores))


def flexible(mask: Callable, change: Callable | None = None) -> Case:
    return hand_built(flex.attend_flexibly(mask, change), patterns.changed(mask, change))


def spread(model: AttentionOnly) -> AttentionOnly:
    """Attention far from uniform, and the same whenever it is built."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.4, generator=generator)
    return model


def of_uneven_layers() -> AttentionOnly:
    """Four blocks: of two, four and eight heads, and one without attention between them."""
    model = AttentionOnly(vocab_size=VOCABULARY, context=CONTEXT, width=32, layers=4)
    attend = model.blocks[0].attend
    for layer, heads in ((0, 2), (2, 4), (3, 8)):
        model.blocks[layer] = AttentionBlock(width=32, heads=heads, attend=attend)
    model.blocks[1] = nn.Linear(32, 32)
    return spread(model)


CASES = {
    **{
        f"{kind}, {implementation}": hugging_face(kind, implementation)
        for kind, family in FAMILIES.items()
        for implementation in family.implementations
    },
    **{
        f"TransformerEncoder, {'pre' if norm_first else 'post'}-norm{more}": Case(
            build=partial(Encoder, norm_first=norm_first, **options), shown=patterns.of_torch
        )
        for norm_first in (True, False)
        for more, options in {
            "": {},
            ", batch second": {"batch_first": False},
            ", no hint": {"hint": False},
        }.items()
    },
    **{
        f"MultiheadAttention, need_weights={need_weights}{more}": Case(
            build=partial(MultiheadAttentions, need_weights=need_weights, **options),
            shown=patterns.of_torch,
        )
        for need_weights in (True, False)
        for more, options in {"": {}, ", batch second": {"batch_first": False}}.items()
    },
    **{
        f"nanoGPT, flash={flash}": Case(
            build=partial(NanoGPT, flash=flash), shown=patterns.of_nanogpt
        )
        for flash in (True, False)
    },
    **{
        f"LitGPT{more}": Case(build=partial(LitGPT, **options), shown=patterns.of_litgpt)
        for more, options in {
            "": {},
            ", one group, half rotated": {"n_query_groups": 1, "rope_n_elem": 4},
            ", own scale": {"attention_scores_scalar": 3},
            ", window": {"sliding_window_size": WINDOW},
            ", soft-capping": {"attention_logit_softcapping": 2.0},
            ", soft-capping, window": {
                "attention_logit_softcapping": 2.0,
                "sliding_window_size": WINDOW,
            },
        }.items()
    },
    "FlexAttention": flexible(flex.causal),
    "FlexAttention, linear biases": flexible(flex.causal, flex.linear_biases),
    "FlexAttention, soft cap, window": flexible(flex.in_a_window, flex.soft_cap),
    "softmax by hand": hand_built(attend_by_hand),
    "uneven layers": Case(
        build=of_uneven_layers,
        shown=partial(patterns.of_hand_built, scores=patterns.causal),
    ),
}


def check(table: pd.DataFrame, shown: Shown, on_text: Shown) -> None:
    """Every field of every head, against sums over the patterns."""
    assert table["head"].tolist() == [h for w in shown.weights for h in range(w.shape[1])]
    assert (table["validity"] == "ok").all()
    assert (table["n"] == SEQUENCES).all()
    expected = oracle.induction(
        shown.weights,
        TOKENS,
        on_text.weights,
        TEXT,
        sampled=STIMULUS.sampled,
        visible=shown.visible,
    )
    assert {*expected, "largest_logit"} == {field.name for field in induction.SPEC.fields}
    for field, estimates in expected.items():
        precision = ENTROPIES if "entropy" in field else SCORES
        for part in ("mean", "stderr", "null"):
            found = table[field if part == "mean" else f"{field}_{part}"].tolist()
            wanted = [getattr(estimate, part) for estimate in estimates]
            assert found == pytest.approx(wanted, abs=precision, rel=0), f"{field}, {part}"
    # Attention is far from uniform, or agreement would say little.
    assert max(estimate.mean for estimate in expected["normalized_entropy"]) < 0.95


def table_of(model: nn.Module, **options: Any) -> pd.DataFrame:
    return measure(
        model,
        vocab_size=VOCABULARY,
        probes=["induction"],
        text=TEXT,
        context=CONTEXT,
        sequences=SEQUENCES,
        seed=0,
        **options,
    )["induction"]


def logits_of(model: nn.Module) -> Tensor:
    # nanoGPT gives the logits of every position only when it is given targets.
    more = {"targets": TOKENS} if isinstance(model, NanoGPT) else {}
    # Compiling FlexAttention's kernel would take many seconds.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        output = copy.deepcopy(model).eval()(TOKENS, **more)
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, tuple) else output


# Of transformers' own call of create_block_mask.
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_field_of_every_head(name):
    model = CASES[name].build()
    table = table_of(model)
    shown, on_text = (CASES[name].shown(model, tokens) for tokens in (TOKENS, TEXT))
    same = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(logits_of(model).double(), shown.logits.double(), **same)
    check(table, shown, on_text)


IN_BLOCKS = [
    name
    for name in CASES
    if name.startswith(("FlexAttention", "gemma2", "mistral", "bloom", "LitGPT, soft", "llama"))
]


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("name", IN_BLOCKS)
def test_a_few_queries_at_a_time(name, monkeypatch):
    for module in (rows, projected):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * SEQUENCES * 4 * CONTEXT * 5)
    model = CASES[name].build()
    check(table_of(model), *(CASES[name].shown(model, tokens) for tokens in (TOKENS, TEXT)))


def test_layers_keep_their_numbers_around_a_block_without_attention():
    table = table_of(of_uneven_layers())
    assert table["layer"].tolist() == [0] * 2 + [2] * 4 + [3] * 8


UNRECOGNISED = hand_built(attend_by_sums)


def test_what_nothing_can_recognise_is_said_with_the_lines_to_write():
    with pytest.raises(NoAttentionError) as raised:
        table_of(UNRECOGNISED.build())
    message = str(raised.value)
    assert "AttentionOnly showed no attention: its module blocks.0 (AttentionBlock)" in message
    assert "adapters={AttentionBlock: read}" in message
    assert len([line for line in message.splitlines() if line.startswith("    ")]) == 5


def read_projections(module, args, kwargs, output):
    query, key, _ = module.projected(args[0])
    return SelfAttention(query=query, key=key, is_causal=True)


def read_pattern(module, args, kwargs, output):
    query, key, _ = module.projected(args[0])
    return Pattern(weights=patterns.causal(query, key).softmax(-1))


@pytest.mark.parametrize("read", [read_projections, read_pattern])
def test_an_adapter_reads_what_nothing_recognises(read):
    model = UNRECOGNISED.build()
    table = table_of(model, adapters={AttentionBlock: read})
    check(table, UNRECOGNISED.shown(model, TOKENS), UNRECOGNISED.shown(model, TEXT))
