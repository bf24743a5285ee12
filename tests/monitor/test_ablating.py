"""Ablating heads while a model runs: against copies of it without them, and against all of it
written out; nothing ablated is the model itself, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.ablating import Ablation, ablated_losses, summed, why_not
from monitor.anatomy import find_language_model
from monitor.capture import observe
from monitor.parts import Parts
from monitor.stimuli import text_stimulus
from tests.models import AttentionOnly, Bigram
from tests.models.hand_built import attend_by_hand, attend_by_sums, attend_causally
from tests.monitor.test_parts import ALL, TOKENS, build, found
from tests.monitor.test_untouched import state
from tests.oracles import ablation as oracle

pytestmark = [
    # What transformers asks of FlexAttention, and what that imports, is deprecated in torch.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
]


def intact(parts: Parts) -> Tensor:
    losses = observe(parts.model, text_stimulus(TOKENS), losses=True).losses
    assert losses is not None
    return losses


def means_of(parts: Parts, tokens: Tensor = TOKENS) -> dict[int, Tensor]:
    return {layer: sums / tokens.numel() for layer, sums in summed(parts, tokens).items()}


def ablated(parts: Parts, *heads: tuple[int, int], by: Any = "zero", kept: bool = False) -> Tensor:
    ablation = Ablation(heads=heads, by=by, patterns_kept=kept)
    return ablated_losses(parts, TOKENS, ablation, means_of(parts))


# How each names a layer's output matrix; GPT-2 has it the other way round.
OUTPUTS = {
    ("gpt2", "sdpa"): lambda m, i: m.transformer.h[i].attn.c_proj.weight,
    ("gpt2", "eager"): lambda m, i: m.transformer.h[i].attn.c_proj.weight,
    ("llama", "sdpa"): lambda m, i: m.model.layers[i].self_attn.o_proj.weight.T,
    ("llama with biases", "eager"): lambda m, i: m.model.layers[i].self_attn.o_proj.weight.T,
    ("llama", "flex_attention"): lambda m, i: m.model.layers[i].self_attn.o_proj.weight.T,
    ("gemma2", "eager"): lambda m, i: m.model.layers[i].self_attn.o_proj.weight.T,
    ("olmo2", "sdpa"): lambda m, i: m.model.layers[i].self_attn.o_proj.weight.T,
    ("gpt_neox", "sdpa"): lambda m, i: m.gpt_neox.layers[i].attention.dense.weight.T,
    ("bloom", "eager"): lambda m, i: m.transformer.h[i].self_attention.dense.weight.T,
    ("nano flash", "own"): lambda m, i: m.h[i].attn.c_proj.weight.T,
    ("nano by hand", "own"): lambda m, i: m.h[i].attn.c_proj.weight.T,
    ("encoder", "own"): lambda m, i: m.layers.layers[i].self_attn.out_proj.weight.T,
    ("encoder, norms last, positions first", "own"): (
        lambda m, i: m.layers.layers[i].self_attn.out_proj.weight.T
    ),
}


@pytest.mark.parametrize(("name", "how"), ALL)
def test_nothing_ablated_is_the_model_itself_and_zeroed_heads_one_without_their_matrices(name, how):
    model = build(name, how)
    parts = found(model)
    assert why_not(parts) is None
    assert torch.equal(ablated(parts), intact(parts))
    # Other batches may be rounded otherwise.
    assert torch.allclose(ablated(parts, kept=True), intact(parts), rtol=0, atol=1e-5)
    if (name, how) not in OUTPUTS:
        return
    outputs = OUTPUTS[name, how]
    for heads in ([(0, 1)], [(1, 3)], [(0, 0), (0, 2), (1, 1)]):
        size = len(outputs(model, 0)) // 4
        without = oracle.without(model, heads, size=size, outputs=outputs)
        got = ablated(parts, *heads)
        assert torch.allclose(got, oracle.losses(without, TOKENS), rtol=1e-4, atol=1e-5)
        assert (got - intact(parts)).abs().max() > 0.01


@pytest.mark.parametrize("attend", [attend_causally, attend_by_hand])
@pytest.mark.parametrize("by", ["zero", "mean"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("heads", [[(0, 2)], [(1, 0), (1, 1)], [(0, 0), (1, 3), (2, 1)]], ids=str)
def test_every_ablation_is_that_of_the_model_written_out(attend, by, kept, heads):
    torch.manual_seed(0)
    model = AttentionOnly(vocab_size=48, context=16, layers=3, width=32, attend=attend)
    parts = found(model)
    expected = oracle.attention_only(model, TOKENS, heads, by, patterns_kept=kept)
    got = ablated(parts, *heads, by=by, kept=kept)
    assert torch.allclose(got.double(), expected, rtol=0, atol=2e-5)
    assert (got - intact(parts)).abs().max() > 1e-3


def test_patterns_kept_differ_where_a_later_layer_listens():
    torch.manual_seed(0)
    parts = found(AttentionOnly(vocab_size=48, context=16, layers=2, width=32))
    first, last = (
        (ablated(parts, head, kept=True) - ablated(parts, head)).abs().max()
        for head in ((0, 1), (1, 1))
    )
    assert first > 1e-3
    assert last < 1e-5, "no pattern comes after the last layer"


def test_however_many_sequences_each_is_ablated_as_it_is_alone():
    parts = found(build("llama", "sdpa"))
    means = means_of(parts)
    for kept in (False, True):
        ablation = Ablation(heads=((0, 1), (1, 0)), by="mean", patterns_kept=kept)
        together = ablated_losses(parts, TOKENS, ablation, means)
        alone = [ablated_losses(parts, row[None], ablation, means) for row in TOKENS]
        assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_means_are_those_of_all_positions_and_sequences():
    torch.manual_seed(0)
    model = AttentionOnly(vocab_size=48, context=16, layers=2, width=32)
    seen: list[Tensor] = []
    model.blocks[1].output.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    means = means_of(found(model))
    seen.clear()
    with torch.no_grad():
        model(TOKENS)
    assert torch.allclose(means[1].flatten().float(), seen[0].mean((0, 1)), atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["autocast", "checkpointed", "compiled", "training", "bfloat16"])
def test_whatever_training_has_it_run_in(how):
    model = build("llama", "sdpa")
    parts = found(model)
    heads = ((0, 1), (1, 2))
    expected = ablated(parts, *heads), ablated(parts, *heads, by="mean", kept=True)
    if how == "bfloat16":
        model.bfloat16()
        got = ablated(parts, *heads), ablated(parts, *heads, by="mean", kept=True)
        for one, other in zip(got, expected, strict=True):
            assert 0 < (one - other).abs().mean() < 0.2
        return
    if how == "checkpointed":
        model.gradient_checkpointing_enable()
    if how in ("training", "checkpointed"):
        model.train()
    if how == "compiled":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        with torch.no_grad():
            model(TOKENS)
        parts = found(model)
    before = state(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        got = ablated(parts, *heads), ablated(parts, *heads, by="mean", kept=True)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert state(model) == before


def test_the_pass_ends_before_its_logits_and_leaves_no_hook():
    model = build("gpt2", "sdpa")
    parts = found(model)
    ran: list[nn.Module] = []
    hook = model.lm_head.register_forward_hook(lambda module, *_: ran.append(module))
    ablated(parts, (0, 1))
    assert ran == []
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_heads_cannot_be_ablated_it_is_said_why():
    assert "blocks not found: no attention was seen" in why_not(found(Bigram()))
    hidden = AttentionOnly(vocab_size=48, context=16, attend=attend_by_sums)
    assert "not found" in why_not(found(hidden))
    apart = Parts.none(find_language_model(Bigram()), "every process holds a part")
    assert why_not(apart) == "blocks not found: every process holds a part"


def test_heads_that_do_not_exist():
    parts = found(build("gpt2", "sdpa"))
    with pytest.raises(ValueError, match="head 4 in layer 1, which has 4 heads"):
        ablated(parts, (1, 4))
    with pytest.raises(ValueError, match=r"layers=\[2\]: expected layers of a model with 2"):
        ablated(parts, (2, 0))


def test_a_model_that_runs_in_another_way_than_its_parts_say_is_not_taken_for_intact():
    torch.manual_seed(0)
    model = AttentionOnly(vocab_size=48, context=16)
    parts = found(model)
    model.blocks[1].attend = attend_by_sums
    with pytest.raises(RuntimeError, match=r"ran without \[\('mixed', 1\)\]"):
        ablated(parts, (1, 0))
