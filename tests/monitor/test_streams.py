"""What one pass shows of the residual stream: beside attention and losses, which it leaves as they
are; in parts that can be joined; and with a reason where it cannot be seen.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from monitor import capture
from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe
from monitor.measure import measure
from monitor.parts import Parts, find_parts
from monitor.stimuli import repeated, text_stimulus
from monitor.streams import sampled_positions
from monitor.streams.attribution import Questions
from tests.hooks import hooks_of
from tests.models import (
    FAMILIES,
    AttentionOnly,
    Bigram,
    Encoder,
    LitGPT,
    MultiheadAttentions,
    NanoGPT,
    attend_by_hand,
    attend_by_sums,
    gpt2,
)

STIMULUS = repeated(vocab_size=48, sequences=5, context=32, bos=0, seed=0)
ALL = {"stream": True, "lens": True, "attribution": True}

MODELS = {
    **{name: lambda of=of: of.build(of.implementations[0]) for name, of in FAMILIES.items()},
    "gpt2 by hand": lambda: gpt2("eager"),
    "attention only": lambda: AttentionOnly(vocab_size=48),
    "by hand": lambda: AttentionOnly(vocab_size=48, attend=attend_by_hand),
    "nanoGPT": lambda: NanoGPT(flash=True),
    "nanoGPT by hand": lambda: NanoGPT(flash=False),
    "LitGPT": LitGPT,
    "encoder": lambda: Encoder(norm_first=True),
    "encoder, batch second": lambda: Encoder(norm_first=True, batch_first=False),
}


def seeing(module: torch.nn.Module, stimulus=STIMULUS, **more) -> Observation:
    model = find_language_model(module.eval())
    return observe(model, stimulus, parts=find_parts(model), **{**ALL, **more})


def assert_equal(one: Observation, other: Observation) -> None:
    torch.testing.assert_close(one.stream.rows, other.stream.rows)
    assert one.stream.positions.tolist() == other.stream.positions.tolist()
    assert one.attribution.components == other.attribution.components
    for sums, others in ((one.lens, other.lens), (one.attribution, other.attribution)):
        for name in sums.__dataclass_fields__:
            values = getattr(sums, name), getattr(others, name)
            if isinstance(values[0], torch.Tensor):
                torch.testing.assert_close(*values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_attention_and_losses_are_as_without(kind):
    module = MODELS[kind]()
    alone = observe(find_language_model(module), STIMULUS, attention=True, losses=True)
    before = hooks_of(module)
    beside = seeing(module, attention=True, losses=True)
    assert beside.reasons == {}
    assert hooks_of(module) == before
    assert torch.overrides._get_current_function_mode() is None
    torch.testing.assert_close(beside.losses, alone.losses)
    for one, other in zip(beside.attention, alone.attention, strict=True):
        assert (one.layer, one.module) == (other.layer, other.module)
        for target in STIMULUS.targets:
            torch.testing.assert_close(one.mass[target], other.mass[target])


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_layer_of_the_sample_makes_the_models_logits(kind):
    module = MODELS[kind]()
    model = find_language_model(module.eval())
    parts = find_parts(model)
    stream = observe(model, STIMULUS, stream=True, parts=parts).stream
    assert stream.rows.shape[0] == len(parts.blocks) + 1
    with torch.no_grad():
        logits = model.logits(STIMULUS.tokens)[:, stream.positions]
    torch.testing.assert_close(parts.logits(stream.rows[-1]), logits, atol=1e-3, rtol=1e-4)


def test_the_sample_is_what_passes_between_blocks():
    module, passed = gpt2().eval(), []
    stream = seeing(module).stream
    for block in module.transformer.h:
        block.register_forward_pre_hook(lambda _, given: passed.append(given[0]))
        block.register_forward_hook(
            lambda _, __, made: passed.append(made[0] if isinstance(made, tuple) else made)
        )
    with torch.no_grad():
        module(STIMULUS.tokens)
    torch.testing.assert_close(stream.rows[0], passed[0][:, stream.positions])
    torch.testing.assert_close(stream.rows[1], passed[1][:, stream.positions])
    torch.testing.assert_close(stream.rows[2], passed[3][:, stream.positions])


@pytest.mark.parametrize("context", [3, 5, 16, 17, 18, 19, 64, 256])
def test_positions_are_spread_and_all_predict(context):
    positions = sampled_positions(context).tolist()
    assert len(set(positions)) == len(positions) == min(16, context - 2)
    assert positions == sorted(positions)
    assert positions[0] == 1
    assert positions[-1] in {1, context - 2}
    gaps = {b - a for a, b in itertools.pairwise(positions)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_everything_is_one_pass_and_needs_no_logits(monkeypatch):
    module = AttentionOnly(vocab_size=48)
    model = find_language_model(module)
    parts, ran = find_parts(model), []
    for name in ("token", "norm", "unembedding"):
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    observe(model, STIMULUS, attention=True, losses=True, stream=True, parts=parts)
    assert ran == ["token", "norm", "unembedding"]
    del ran[:]
    # Without losses the pass ends where everything was seen.
    only = observe(model, STIMULUS, attention=True, attention_calls=2, stream=True, parts=parts)
    assert ran == ["token"]
    assert len(only.attention) == 2
    assert only.stream.rows.shape[0] == 3


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return output


def test_nothing_as_large_as_all_logits_or_patterns_is_held(monkeypatch):
    torch.manual_seed(0)
    stimulus = repeated(vocab_size=1000, sequences=8, context=64, bos=0, seed=0)
    model = find_language_model(AttentionOnly(vocab_size=1000, width=16))
    parts = find_parts(model)
    monkeypatch.setattr("monitor.streams.lens._LOGIT_BYTES", 4 * 8 * 1000)
    with Largest() as largest:
        seen = observe(model, stimulus, parts=parts, **ALL)
    assert seen.reasons == {}
    # The unembedding itself is the largest, at 1,000 × 16; all logits would be 512,000 numbers, and
    # all patterns 131,072.
    assert largest.size < 3 * 8 * 64 * 16 + 16_000


def test_parts_of_a_stimulus_are_joined(monkeypatch):
    module = gpt2()
    whole = seeing(module, attention=True, losses=True)
    cpu = torch.device("cpu")
    overlapping = [(start, STIMULUS.rows(start, stop, cpu)) for start, stop in ((2, 5), (0, 3))]
    seen = [(start, seeing(module, part, losses=True)) for start, part in overlapping]
    assert_equal(Observation.join(STIMULUS, seen), whole)
    monkeypatch.setattr(capture, "_LOGIT_BYTES", 2 * 4 * 32 * 48)
    cut = replace(find_language_model(module), unembedding_call=None)
    assert_equal(observe(cut, STIMULUS, losses=True, parts=find_parts(cut), **ALL), whole)
    # What one process could not see, nobody saw.
    missing = replace(seen[0][1], lens=None, reasons={"lens": "out of memory"})
    joined = Observation.join(STIMULUS, [(2, missing), seen[1]])
    assert joined.lens is None
    assert joined.reasons == {"lens": "out of memory"}
    assert joined.attribution is not None


def test_shuffled_targets_are_others_of_the_block_and_always_the_same():
    questions, tokens = Questions.of(STIMULUS), STIMULUS.tokens
    for row in range(len(tokens)):
        here = questions.sequence == row
        query, targets = questions.query[here], questions.targets[:, here]
        period = int(STIMULUS.period[row])
        assert query.tolist() == list(range(1 + period, 31))
        assert targets[0].tolist() == tokens[row, query + 1].tolist()
        assert bool((targets[0] != targets[1]).all())
        assert set(targets[1].tolist()) <= set(tokens[row, 1 : 1 + period].tolist())
        exchanged = set(map(tuple, targets.T.tolist()))
        assert len({a for a, _ in exchanged}) == len({b for _, b in exchanged}) == len(exchanged)
    last = STIMULUS.rows(4, 5, torch.device("cpu"))
    alone = Questions.of(last).targets
    assert torch.equal(alone, questions.targets[:, questions.sequence == 4])


def test_a_reason_for_everything_that_cannot_be_seen():
    module = gpt2()
    model = find_language_model(module)
    parts = find_parts(model)
    nothing = observe(model, STIMULUS, losses=True, parts=Parts.none(model, "sharded"), **ALL)
    assert nothing.stream is nothing.lens is nothing.attribution is None
    assert nothing.reasons.keys() == ALL.keys()
    assert all("sharded" in why for why in nothing.reasons.values())
    assert nothing.losses is not None
    headless = replace(parts, final_norm=None, reasons={"final_norm": "not found"})
    seen = observe(model, STIMULUS, parts=headless, **ALL)
    assert seen.stream is not None
    assert seen.reasons == dict.fromkeys(("lens", "attribution"), "final_norm: not found")
    text = observe(model, text_stimulus(STIMULUS.tokens), parts=parts, **ALL)
    assert text.reasons == {"attribution": "the stimulus text repeats nothing"}
    with pytest.raises(ValueError, match=r"parts=None: .* to see stream, lens, attribution"):
        observe(model, STIMULUS, **ALL)


def test_a_stream_that_is_normed_after_every_write_has_a_lens_but_no_attribution():
    seen = seeing(Encoder(norm_first=False))
    assert seen.lens.agreement[-1].tolist() == [8.0] * 5
    assert "norms the stream itself after every write" in seen.reasons["attribution"]
    tables = measure(Encoder(norm_first=False), probes=["attribution", "logit_lens"])
    assert "norms the stream itself" in tables["attribution"]["validity"][0]
    assert set(tables["logit_lens"]["validity"]) == {"ok"}


def test_terms_that_do_not_add_up_are_not_published():
    model = find_language_model(gpt2().eval())
    parts = find_parts(model)
    first, second = parts.blocks
    twice = replace(first, attention_write=replace(first.attention_write, scale=2.0))
    wrong = replace(parts, blocks=(twice, second))
    seen = observe(model, STIMULUS, losses=True, parts=wrong, **ALL)
    assert seen.attribution is None
    assert "adds up to logits that are off by" in seen.reasons["attribution"]


def test_an_error_in_what_is_summed_up_leaves_the_rest():
    model = find_language_model(gpt2().eval())
    parts = find_parts(model)
    first, second = parts.blocks
    beyond = replace(first, mixing=replace(first.mixing, columns=first.mixing.columns + 1))
    wrong = replace(parts, blocks=(beyond, second))
    seen = observe(model, STIMULUS, attention=True, losses=True, parts=wrong, **ALL)
    assert seen.reasons["attribution"].startswith("IndexError")
    assert len(seen.attention) == 2
    torch.testing.assert_close(seen.losses, seeing(model.module, losses=True).losses)
    assert seen.lens is not None


def test_models_without_blocks_or_attention_that_is_seen_get_reasons():
    bigram = find_language_model(Bigram(vocab_size=48))
    seen = observe(bigram, STIMULUS, losses=True, parts=find_parts(bigram), **ALL)
    assert seen.reasons.keys() == ALL.keys()
    assert seen.losses is not None
    # Attention modules one after the other are no blocks that pass a stream on.
    bare = observe(
        find_language_model(MultiheadAttentions(need_weights=False)), STIMULUS, attention=True
    )
    beside = seeing(MultiheadAttentions(need_weights=False), attention=True)
    assert beside.reasons.keys() == ALL.keys()
    torch.testing.assert_close(beside.attention[1].entropy, bare.attention[1].entropy)
    by_sums = AttentionOnly(vocab_size=48, attend=attend_by_sums)
    assert "no attention" in seeing(by_sums).reasons["attribution"]


def test_half_precision_is_near():
    exact, half = (seeing(module) for module in (gpt2(), gpt2().bfloat16()))
    assert half.reasons == {}
    assert half.stream.rows.dtype == torch.float32
    largest = float(exact.attribution.correct.abs().max())
    torch.testing.assert_close(
        half.attribution.correct, exact.attribution.correct, atol=0.1 * largest, rtol=0
    )


def test_the_lens_runs_on_one_stimulus():
    torch.manual_seed(0)
    module, passes = AttentionOnly(), []
    text = torch.randint(64, (4, 64))
    with module_hooks.register_module_forward_hook(
        lambda inner, given, _: passes.append(given[0].shape) if inner is module.norm else None
    ):
        measure(module, probes=["logit_lens"], text=text, context=64, sequences=4)
    # The lens norms all layers' samples at once: 3 layers of 4 sequences, 8 predictions each.
    assert [shape for shape in passes if tuple(shape) == (12, 8, 64)] == [(12, 8, 64)]
