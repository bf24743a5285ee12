"""The loss of a model as a function of a copy of its weights: the same loss and gradient as the
model's own, of any family and precision, and the model is left as it was.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from monitor.anatomy import find_language_model
from monitor.streams import UnseenError
from monitor.walks import TextLoss
from tests import models
from tests.callbacks.tiny import TinyLM, text

TOKENS = text(5)
EVERYTHING = torch.arange(5)


def of(module: nn.Module, tokens: torch.Tensor = TOKENS):
    return TextLoss.of(find_language_model(module), tokens)


@torch.enable_grad()
def by_backward(module: nn.Module, tokens: torch.Tensor, items: torch.Tensor):
    """Losses and gradients as training would have them, in float32, each weight once."""
    module = copy.deepcopy(module).float().eval().requires_grad_()
    output = module(tokens[items])
    logits = getattr(output, "logits", output)
    losses = torch.stack(
        [F.cross_entropy(row[:-1], ids[1:]) for row, ids in zip(logits, tokens[items], strict=True)]
    )
    losses.mean().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in module.parameters()])


def close(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


class Checkpointed(TinyLM):
    """Computes its blocks again in every backward pass."""

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.unembedding(x)


class Tied(TinyLM):
    def __init__(self):
        super().__init__()
        self.unembedding.weight = self.embedding.weight


@pytest.mark.parametrize("kind", [TinyLM, Checkpointed, Tied])
def test_gradients_are_those_of_training(kind):
    torch.manual_seed(0)
    module = kind()
    items = torch.tensor([4, 0, 2])
    with of(module) as loss:
        assert (loss.items, loss.size) == (5, 5 * 31)
        assert len(loss.start) == sum(p.numel() for p in module.parameters())
        close(loss.gradient(loss.start, items), by_backward(module, TOKENS, items))
        # Elsewhere than where the model is: what is computed again sees the same weights.
        other = loss.start + 0.1 * torch.randn(len(loss.start))
        found = loss.gradient(other, items)
    nn.utils.vector_to_parameters(other, module.parameters())
    close(found, by_backward(module, TOKENS, items))


@pytest.mark.parametrize("kind", models.HUGGING_FACE)
def test_every_family_can_be_asked(kind):
    torch.manual_seed(0)
    module = models.HUGGING_FACE[kind]()
    vocabulary = find_language_model(module).vocab_size
    tokens = torch.randint(vocabulary, (3, 24))
    with of(module, tokens) as loss:
        found = loss.gradient(loss.start, torch.arange(3))
    close(found, by_backward(module, tokens, torch.arange(3)))


def test_half_precision_is_sampled_in_float32():
    torch.manual_seed(0)
    module = TinyLM(dropout=0.5).bfloat16()
    with of(module) as loss, of(module.float()) as exact:
        assert loss.start.dtype == torch.float32
        assert torch.equal(loss.start, exact.start)
        close(loss.gradient(loss.start, EVERYTHING), exact.gradient(exact.start, EVERYTHING))
    assert module.training


def test_weights_that_are_not_trained_stay():
    torch.manual_seed(0)
    module = TinyLM()
    module.embedding.requires_grad_(False)
    with of(module) as loss:
        _, slope = loss.gradient(loss.start, EVERYTHING)
    _, of_all = by_backward(module, TOKENS, EVERYTHING)
    frozen = module.embedding.weight.numel()
    assert len(slope) == len(of_all) - frozen
    torch.testing.assert_close(slope, of_all[frozen:])
    # A model that is only looked at has no weights that are trained: all are meant.
    with of(module.requires_grad_(False)) as loss:
        assert len(loss.start) == len(of_all)


def test_many_logits_come_a_few_sequences_at_a_time(monkeypatch):
    torch.manual_seed(0)
    module = TinyLM()
    with of(module) as loss:
        at_once = loss.gradient(loss.start, EVERYTHING)
        monkeypatch.setattr("monitor.walks.text._LOGIT_BYTES", 2 * 4 * 32 * 32)
        close(loss.gradient(loss.start, EVERYTHING), at_once)


def test_no_trace_is_left():
    torch.manual_seed(0)
    module = TinyLM(dropout=0.3)
    module.blocks[0].register_buffer("seen", torch.zeros(()))
    module.blocks[0].register_forward_hook(lambda block, *_: block.seen.add_(1) and None)
    called = []
    module.blocks[1].register_full_backward_hook(lambda *_: called.append(1))
    module(TOKENS).sum().backward()
    assert called.pop()
    grads = [p.grad for p in module.parameters()]
    kept = [(p, p.detach().clone(), p._version) for p in module.parameters()]
    values, stream = [grad.clone() for grad in grads], torch.get_rng_state()
    seen = module.blocks[0].seen.clone()
    with of(module) as loss:
        loss.gradient(loss.start + 1, EVERYTHING)
    assert not called
    for p, grad, value, (same, before, version) in zip(
        module.parameters(), grads, values, kept, strict=True
    ):
        assert p is same
        assert p.grad is grad
        assert torch.equal(grad, value)
        assert torch.equal(p, before)
        assert p._version == version
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(module.blocks[0].seen, seen)
    assert all(part.training for part in module.modules())
    # The hook is where it was.
    module(TOKENS).sum().backward()
    assert called == [1]


@torch.inference_mode()
def test_inference_mode_does_not_matter():
    torch.manual_seed(0)
    module = TinyLM()
    with of(module) as loss:
        _, slope = loss.gradient(loss.start, EVERYTHING)
    assert slope.abs().max() > 0


def test_weights_that_are_no_plain_numbers_are_refused():
    class Packed(torch.Tensor):
        pass

    module = TinyLM()
    found = find_language_model(module)
    weight = torch.randn(32, 16).as_subclass(Packed)
    module.unembedding.weight = nn.Parameter(weight)
    with (
        pytest.raises(UnseenError, match=r"unembedding.weight is a Packed of torch.float32"),
        TextLoss.of(found, TOKENS),
    ):
        pass
