"""A model in training is left as it was: modes, buffers, attributes, gradients, random streams,
autocast, hooks and what was compiled, also where its forward pass raises.
"""

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from monitor.anatomy import find_language_model
from monitor.capture import observe
from monitor.measure import Monitor, measure
from monitor.record import Measurement
from monitor.stimuli import repeated
from monitor.untouched import untouched
from tests import models
from tests.callbacks.tiny import TinyLM
from tests.models import AttentionOnly

TOKENS = torch.arange(32).view(2, 16)
STIMULUS = repeated(vocab_size=64, sequences=4, context=64, bos=None, seed=0)


class Restless(AttentionOnly):
    """Draws from every random stream, and changes buffers and attributes whenever it is called."""

    def __init__(self) -> None:
        super().__init__(heads=2)
        self.dropout = nn.Dropout(0.5)
        self.batch_norm = nn.BatchNorm1d(64)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last_tokens", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("unset", None)
        self.cached = "nothing"
        self.trained_as: list[bool] = []
        self.raises = False

    def forward(self, tokens):
        self.trained_as = [*self.trained_as, self.training]
        self.noise = (random.random(), np.random.random(), torch.rand(1).item())
        self.calls += 1
        self.last_tokens = tokens
        self.unset = torch.ones(2)
        self.cached = torch.ones(3)
        self.blocks[0].was_called = True
        self.register_buffer("new", torch.ones(1))
        # Statistics are kept even in evaluation mode.
        self.batch_norm.running_mean.add_(1)
        self.batch_norm.num_batches_tracked.add_(1)
        logits = self.dropout(super().forward(tokens))
        if self.raises:
            raise RuntimeError("out of memory, say")
        return logits


def streams() -> tuple:
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2:],
        torch.random.get_rng_state().tolist(),
    )


def state(model: nn.Module) -> dict:
    """All there is to see of a model: values, identities, modes, gradients and hooks."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "values": {name: tensor.tolist() for name, tensor in tensors},
        "tensors": {name: id(tensor) for name, tensor in tensors},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors},
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.tolist())
            for name, p in model.named_parameters()
        },
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items() if key != "training"}
            for name, module in model.named_modules()
        },
        "hooks": {
            name: [list(getattr(module, kind).items()) for kind in hooks]
            for name, module in model.named_modules()
        },
        "streams": streams(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    }


def trained(
    probe: str,
    text: Tensor,
    *,
    steps: int,
    check: Callable[[Measurement], None] | None,
) -> tuple[list, str]:
    """What a training leaves of weights and random streams. With a `check` it is measured between
    the gradients and the update of every step, which changes nothing of the model.
    """
    torch.manual_seed(0)
    np.random.seed(0)
    model = TinyLM(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Monitor(None, probes=[probe], text=text) as watch:
        for step in range(steps):
            tokens = torch.randint(32, (4, 32))
            logits = model(tokens)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            if check is not None:
                before = state(model)
                check(watch.measure(model, step, seconds=math.inf))
                assert state(model) == before
            optimizer.step()
    return [p.detach().tolist() for p in model.parameters()], str(streams())


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Restless()
    model.blocks[1].eval()
    model.norm.weight.requires_grad_(requires_grad=False)
    model.blocks[0].register_forward_hook(lambda *_: None)
    model.register_forward_pre_hook(lambda *_: None)
    model(TOKENS).sum().backward()
    return model


def measure_it(model: nn.Module) -> None:
    measure(model, context=64, sequences=2)


def observe_it(model: nn.Module) -> None:
    observe(find_language_model(model), STIMULUS, attention=True, losses=True)


def observe_attention_only(model: nn.Module) -> None:
    """The forward pass is broken off at its last attention call."""
    observe(find_language_model(model), STIMULUS, attention=True, attention_calls=2)


def call_it(model: nn.Module) -> None:
    with untouched(model):
        model(TOKENS)


LOOKING = [measure_it, observe_it, observe_attention_only, call_it]


@pytest.mark.parametrize("look", LOOKING)
def test_everything_is_as_it_was(look: Callable, model):
    before = state(model)
    look(model)
    assert state(model) == before


@pytest.mark.parametrize("look", LOOKING)
def test_in_an_autocast_region_without_gradients(look: Callable, model):
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = state(model)
        assert before["autocast"] == (True, torch.bfloat16)
        look(model)
        assert state(model) == before


@pytest.mark.parametrize("look", LOOKING)
def test_where_the_forward_pass_raises(look: Callable, model):
    before = state(model)
    language_model = find_language_model(model)
    model.raises = True
    before["attributes"][""]["raises"] = id(True)
    if look in {observe_attention_only, observe_it}:
        # These passes end before the model would raise by itself.
        model.blocks[1].attend = fail
        before["attributes"]["blocks.1"]["attend"] = id(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            observe(language_model, STIMULUS, attention=True, losses=look is observe_it)
    else:
        with pytest.raises(Exception, match="out of memory"):
            look(model)
    assert state(model) == before


def fail(*_):
    raise RuntimeError("out of memory")


def test_inside_it_evaluates_without_gradients_and_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16), untouched(model):
        logits = model(TOKENS)
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert not logits.requires_grad
        assert not logits.is_inference()
        assert logits.dtype == torch.float32


def test_modes_are_set_without_calling_train_or_eval(model):
    def forbidden(mode=True):
        raise AssertionError("an override of train may do anything")

    model.train = model.eval = forbidden
    call_it(model)
    assert model.training


@pytest.mark.parametrize("kind", models.HUGGING_FACE)
def test_models_of_hugging_face(kind):
    model = models.HUGGING_FACE[kind]().train()
    before = state(model)
    measure(model, sequences=2)
    assert state(model) == before


def test_training_goes_on_as_if_nothing_had_happened():
    """Dropout, momentum and data order: weights are equal bit for bit."""

    def trained(look: Callable[[nn.Module], None]) -> dict:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = Restless()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(4):
            tokens = torch.randint(64, (4, 32))
            loss = model(tokens).logsumexp(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            look(model)
            optimizer.step()
            look(model)
        return {name: value.tolist() for name, value in model.state_dict().items()}

    assert trained(measure_it) == trained(lambda model: None)


@pytest.mark.parametrize("how", ["torch.compile", "module.compile"])
def test_compiled_models_are_not_compiled_again(how):
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    module = AttentionOnly(layers=1)
    if how == "torch.compile":
        model = torch.compile(module, backend=counter)
    else:
        module.compile(backend=counter)
        model = module
    tokens = STIMULUS.tokens

    def step():
        model(tokens).sum().backward()

    step()
    step()
    compiled = counter.frame_count
    assert compiled >= 1
    gradient = module.token.weight.grad.clone()
    tables = measure(model, context=64, sequences=2)
    assert (tables["induction"]["validity"] == "ok").all()
    assert torch.equal(module.token.weight.grad, gradient)
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        step()
    assert counter.frame_count == compiled
    # What was compiled is still what runs: another shape is compiled anew.
    model(tokens[:, :30])
    assert counter.frame_count > compiled
    torch._dynamo.reset()


def test_it_can_be_nested(model):
    before = state(model)
    with untouched(model):
        call_it(model)
        assert not model.training
        model(TOKENS)
    assert state(model) == before
