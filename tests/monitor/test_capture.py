"""One forward pass and what is kept of it: attention wherever a model computes it, losses, cuts of
the batch, and a planted induction circuit whose every figure is known.
"""

import contextlib
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from monitor import capture, watch
from monitor.anatomy import find_language_model
from monitor.capture import NoAttentionError, observe
from monitor.stimuli import repeated, repeated_from, text_stimulus
from tests.hooks import hooks_of
from tests.models import AttentionOnly, Bigram, PlantedInduction
from tests.oracles.attention import ON_KEYS, attention_on

STIMULUS = repeated(vocab_size=64, sequences=6, context=64, bos=None, seed=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return find_language_model(AttentionOnly())


class Lone(nn.Module):
    """A model around one attending module, which maps [batch, position, 32] to the same."""

    def __init__(self, attending: nn.Module) -> None:
        super().__init__()
        self.token = nn.Embedding(64, 32)
        self.position = nn.Embedding(64, 32)
        self.attending = attending
        self.unembedding = nn.Linear(32, 64)

    def forward(self, tokens):
        residual = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.unembedding(self.attending(residual))


class OfTorch(nn.Module):
    """torch's own multi-head attention."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first)

    def forward(self, residual):
        mask = nn.Transformer.generate_square_subsequent_mask(residual.shape[1])
        if not self.batch_first:
            residual = residual.transpose(0, 1)
        mixed, _ = self.attention(
            residual, residual, residual, attn_mask=mask, is_causal=True, need_weights=False
        )
        return mixed if self.batch_first else mixed.transpose(0, 1)


class EncoderOfTorch(nn.Module):
    """torch's own transformer layers, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, residual):
        mask = nn.Transformer.generate_square_subsequent_mask(residual.shape[1])
        return self.layers(residual, mask=mask, is_causal=True)


def test_planted_induction_circuit():
    """Vocabulary 40, two copies of 12 tokens without a leading token, sharpness 20: the first query
    of the second copy finds its token behind position 0 too, which stands as its own predecessor.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = torch.stack([torch.randperm(40, generator=generator)[:12] for _ in range(8)])
    stimulus = repeated_from(blocks.repeat(1, 2), torch.full((8,), 12), lead=0)
    planted = find_language_model(PlantedInduction(vocab_size=40, context=24, sharpness=20.0))
    observation = observe(planted, stimulus, attention=True, losses=True)
    first, second = observation.attention
    assert [first.layer, second.layer] == [0, 1]

    def score(layer, target):
        return (layer.mass[target][:, 0] / stimulus.targets[target].queries).tolist()

    assert score(first, "previous_token") == pytest.approx([1.0] * 8, abs=1e-6)
    assert score(first, "prefix_matching") == pytest.approx([0.0] * 8, abs=1e-6)
    assert score(second, "prefix_matching") == pytest.approx([23 / 24] * 8, abs=1e-6)
    assert score(second, "duplicate_token") == pytest.approx([1 / 24] * 8, abs=1e-6)
    # Half of the attention of that one query goes astray, and it alone guesses.
    later = observation.losses[:, 12:]
    assert later[:, 0].tolist() == pytest.approx([math.log(2)] * 8, abs=1e-3)
    assert later[:, 1:].max() < 1e-6


def test_what_is_seen_is_what_the_model_attends(model):
    patterns = []

    def attend(query, key, value):
        later = torch.ones(64, 64, dtype=torch.bool).triu(1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(16)
        patterns.append(scores.masked_fill(later, float("-inf")).softmax(-1))
        return patterns[-1] @ value

    observation = observe(model, STIMULUS, attention=True)
    for block in model.module.blocks:
        block.attend = attend
    with torch.no_grad():
        model.module(STIMULUS.tokens)
    for layer, weights in zip(observation.attention, patterns, strict=True):
        for name, wanted in ON_KEYS.items():
            for head in range(4):
                expected = attention_on(wanted, weights[:, head].double(), STIMULUS.tokens).mean
                got = layer.mass[name][:, head].sum() / STIMULUS.targets[name].queries.sum()
                assert got.item() == pytest.approx(expected, abs=1e-6)


def test_losses_are_the_cross_entropy_of_each_next_token(model):
    losses = observe(model, STIMULUS, losses=True).losses
    assert losses.shape == (6, 63)
    with torch.no_grad():
        probabilities = model.module(STIMULUS.tokens).double().softmax(-1)
    for sequence, row in enumerate(STIMULUS.tokens.tolist()):
        for position, token in enumerate(row[1:]):
            expected = -math.log(probabilities[sequence, position, token])
            assert losses[sequence, position].item() == pytest.approx(expected, abs=1e-5)


def test_only_what_was_asked_for_is_kept(model):
    assert observe(model, STIMULUS, attention=True).losses is None
    assert observe(model, STIMULUS, losses=True).attention is None


class LargestLogits(TorchDispatchMode):
    """Notes for how many positions at once a log-softmax over the vocabulary is computed."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._log_softmax.default:
            self.rows = max(self.rows, args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


class Scaled(AttentionOnly):
    """Its logits are more than what its unembedding gives."""

    def forward(self, tokens):
        return 2 * super().forward(tokens)


@pytest.mark.parametrize("sequences_at_once", [1, 4])
def test_cutting_the_batch_changes_nothing(sequences_at_once, monkeypatch):
    torch.manual_seed(0)
    model = find_language_model(Scaled())
    assert model.unembedding_call is None
    whole = observe(model, STIMULUS, attention=True, losses=True)
    monkeypatch.setattr(capture, "_LOGIT_BYTES", sequences_at_once * 4 * 64 * 64)
    seen = []
    with module_hooks.register_module_forward_hook(
        lambda module, _, out: seen.append(len(out)) if module is model.module else None
    ):
        cut = observe(model, STIMULUS, attention=True, losses=True)
    assert seen == {1: [1] * 6, 4: [4, 2]}[sequences_at_once]
    torch.testing.assert_close(cut.losses, whole.losses)
    for one, other in zip(cut.attention, whole.attention, strict=True):
        assert (one.layer, one.module) == (other.layer, other.module)
        torch.testing.assert_close(one.entropy, other.entropy, atol=1e-4, rtol=0)
        for name in STIMULUS.targets:
            torch.testing.assert_close(one.mass[name], other.mass[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("positions_at_once", [1, 50, 10_000])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_from_chunks_of_the_logits(model, positions_at_once, bias, monkeypatch):
    """As from all logits at once; no larger chunk of them is ever computed."""
    module = model.module
    module.unembedding = nn.Linear(64, 64, bias=bias)
    found = find_language_model(module)
    # Each block's output layer is as wide as the logits, and comes before.
    assert found.unembedding_call == 3
    with torch.no_grad():
        logits = module(STIMULUS.tokens)
    whole = F.cross_entropy(logits[:, :-1].mT, STIMULUS.tokens[:, 1:], reduction="none")
    monkeypatch.setattr(watch, "_LOGIT_BYTES", positions_at_once * 4 * 64)
    for seen in ({"attention": True}, {"together": True}, {}):
        with LargestLogits() as largest:
            losses = observe(found, STIMULUS, losses=True, **seen).losses
        torch.testing.assert_close(losses, whole)
        assert largest.rows == min(positions_at_once, 6 * 63)


def test_a_pass_without_losses_ends_at_the_last_attention_call(model):
    ran = []
    model.module.unembedding.register_forward_pre_hook(lambda *_: ran.append("unembedding"))
    full = observe(model, STIMULUS, attention=True)
    assert ran == ["unembedding"]
    short = observe(model, STIMULUS, attention=True, attention_calls=2)
    assert ran == ["unembedding"]
    for one, other in zip(short.attention, full.attention, strict=True):
        torch.testing.assert_close(one.mass["prefix_matching"], other.mass["prefix_matching"])
    both = observe(model, STIMULUS, attention=True, losses=True, attention_calls=2)
    assert both.losses is not None
    assert ran == ["unembedding", "unembedding"]


def test_watching_does_not_change_the_losses(model):
    alone = observe(model, STIMULUS, losses=True).losses
    for entropy in (True, False):
        stimulus = replace(STIMULUS, entropy=entropy)
        watched = observe(model, stimulus, attention=True, losses=True).losses
        torch.testing.assert_close(watched, alone, atol=1e-5, rtol=1e-5)


def test_layers_are_named_and_numbered(model):
    layers = observe(model, STIMULUS, attention=True).attention
    assert [(layer.layer, layer.module) for layer in layers] == [(0, "blocks.0"), (1, "blocks.1")]
    hybrid = AttentionOnly(layers=4)
    hybrid.blocks[0], hybrid.blocks[2] = nn.Linear(64, 64), nn.Linear(64, 64)
    layers = observe(find_language_model(hybrid), STIMULUS, attention=True).attention
    assert [layer.layer for layer in layers] == [1, 3]
    shared = AttentionOnly(layers=1)
    shared.blocks.append(shared.blocks[0])
    layers = observe(find_language_model(shared), STIMULUS, attention=True).attention
    assert [layer.layer for layer in layers] == [0, 1]


def test_text_has_no_entropy_and_only_its_own_target(model):
    layers = observe(model, text_stimulus(STIMULUS.tokens), attention=True).attention
    assert all(list(layer.mass) == ["previous_token"] for layer in layers)
    assert all(layer.entropy is None for layer in layers)


def test_attention_imported_by_name_is_seen():
    def attend(query, key, value):
        return imported_by_name(query, key, value, None, 0.0, True)

    torch.manual_seed(0)
    by_name = find_language_model(AttentionOnly(attend=attend))
    torch.manual_seed(0)
    plain = find_language_model(AttentionOnly())
    for one, other in zip(
        observe(by_name, STIMULUS, attention=True).attention,
        observe(plain, STIMULUS, attention=True).attention,
        strict=True,
    ):
        torch.testing.assert_close(one.mass["prefix_matching"], other.mass["prefix_matching"])
        assert one.causal


@pytest.mark.parametrize(
    ("attending", "layers"),
    [
        (OfTorch(batch_first=True), 1),
        (OfTorch(batch_first=False), 1),
        (EncoderOfTorch(), 2),
    ],
    ids=["MultiheadAttention", "MultiheadAttention, batch second", "TransformerEncoder"],
)
def test_attention_of_torchs_own_layers_is_seen(attending, layers):
    """They too go through scaled_dot_product_attention, deeper inside torch."""
    seen = observe(find_language_model(Lone(attending)), STIMULUS, attention=True).attention
    assert len(seen) == layers
    assert all(layer.causal for layer in seen)
    assert all(layer.mass["previous_token"].shape == (6, 4) for layer in seen)


def test_no_attention_is_said_with_what_to_do():
    model = find_language_model(Bigram())
    message = r"Bigram showed no attention: .* 64 positions .* To go on without: probes="
    with pytest.raises(NoAttentionError, match=message):
        observe(model, STIMULUS, attention=True)
    assert observe(model, STIMULUS, losses=True).losses is not None


def test_no_hook_is_left(model):
    mine = []
    model.module.blocks[0].register_forward_hook(lambda *_: mine.append("ran"))
    before = hooks_of(model.module)
    assert len(before) > 40
    observe(model, STIMULUS, attention=True)
    observe(model, STIMULUS, attention=True, attention_calls=1)

    def fail(query, key, value):
        raise RuntimeError("out of memory, say")

    model.module.blocks[1].attend = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        observe(model, STIMULUS, attention=True)
    assert hooks_of(model.module) == before
    assert mine == ["ran", "ran"]
    assert torch.overrides._get_current_function_mode() is None


def test_other_threads_are_not_watched(model):
    """Another model attends, in another thread, between this one's two layers."""
    other = AttentionOnly(layers=3)

    def attend_beside(query, key, value):
        thread = threading.Thread(target=other, args=(STIMULUS.tokens,))
        thread.start()
        thread.join()
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    plain = observe(model, STIMULUS, attention=True).attention
    model.module.blocks[0].attend = attend_beside
    beside = observe(model, STIMULUS, attention=True).attention
    assert [layer.module for layer in beside] == ["blocks.0", "blocks.1"]
    for one, two in zip(plain, beside, strict=True):
        torch.testing.assert_close(one.mass["previous_token"], two.mass["previous_token"])


class Waiting(nn.Module):
    """Its forward pass says that it is running, and waits."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.released = threading.Event(), threading.Event()

    def forward(self, tokens):
        self.running.set()
        assert self.released.wait(timeout=10)
        return tokens


def test_a_part_that_runs_in_another_thread_does_not_lend_its_name(model):
    waiting = model.module.blocks[1].waiting = Waiting()

    def attend(query, key, value):
        thread = threading.Thread(target=waiting, args=(STIMULUS.tokens,))
        thread.start()
        assert waiting.running.wait(timeout=10)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        waiting.released.set()
        thread.join()
        return mixed

    model.module.blocks[0].attend = attend
    layers = observe(model, STIMULUS, attention=True).attention
    assert [layer.module for layer in layers] == ["blocks.0", "blocks.1"]


class Unavailable(nn.Module):
    def forward(self, residual):
        raise ImportError("no fused kernel here, say")


def test_a_part_that_failed_and_was_caught_does_not_lend_its_name(model):
    model.module.blocks[0].fused = Unavailable()

    def attend(query, key, value):
        with contextlib.suppress(ImportError):
            model.module.blocks[0].fused(query)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    model.module.blocks[0].attend = attend
    layers = observe(model, STIMULUS, attention=True).attention
    assert [layer.module for layer in layers] == ["blocks.0", "blocks.1"]


def test_a_model_in_bfloat16():
    torch.manual_seed(0)
    module = AttentionOnly()
    exact = observe(find_language_model(module), STIMULUS, attention=True, losses=True)
    half = observe(find_language_model(module.bfloat16()), STIMULUS, attention=True, losses=True)
    assert half.losses.dtype == torch.float32
    torch.testing.assert_close(half.losses, exact.losses, atol=0.1, rtol=0)
    for one, two in zip(half.attention, exact.attention, strict=True):
        queries = STIMULUS.targets["previous_token"].queries[:, None]
        torch.testing.assert_close(
            one.mass["previous_token"] / queries,
            two.mass["previous_token"] / queries,
            atol=2e-3,
            rtol=0,
        )
