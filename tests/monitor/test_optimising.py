"""What is read of optimisers is what they do: exactly so for gradient descent, and like an oracle's
own steps for AdamW; accumulated, clipped, by closures. What was not read is never told, and the
optimisers are left as they were.
"""

import math

import pytest
import torch
from torch import nn

from monitor.optimising import NOT_YET, UNFORESEEN, OptimiserWatch
from tests.callbacks.tiny import identical


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def backward(model, scale=1.0):
    """The gradient of a loss that has one in every parameter."""
    (scale * model(torch.tensor([[1.0, -2.0, 3.0]]).double()).square().sum()).backward()


def stepped(model, optimizer, **more):
    """What was read of one step."""
    watch = OptimiserWatch([optimizer], every=1, **more)
    before = {p: p.detach().clone() for p in model.parameters()}
    optimizer.step()
    training = watch.training(step=1)
    watch.close()
    return training, before


def test_gradient_descent_moves_by_the_rate_times_the_gradient():
    model = linear()
    backward(model)
    training, _ = stepped(model, torch.optim.SGD(model.parameters(), lr=0.25))
    assert training.why == "ok"
    for parameter in model.parameters():
        update = training.updates[parameter]
        assert update.gradient == pytest.approx(parameter.grad.norm().item(), rel=1e-12)
        assert update.change == pytest.approx(0.25 * update.gradient, rel=1e-12)
        assert update.learning_rate == 0.25


def test_adamw_moves_as_its_authors_write_it():
    """Kingma & Ba 2015, with the decay of Loshchilov & Hutter 2019; the third step."""
    rate, decay, (b1, b2), eps = 0.01, 0.1, (0.9, 0.999), 1e-8
    model = linear()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=decay, betas=(b1, b2), eps=eps
    )
    watch = OptimiserWatch([optimizer], every=1)
    weight = model.weight
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for number in (1, 2, 3):
        optimizer.zero_grad()
        backward(model)
        gradient, before = weight.grad.clone(), weight.detach().clone()
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        adam = (m / (1 - b1**number)) / ((v / (1 - b2**number)).sqrt() + eps)
        moved = rate * (adam + decay * before)
        optimizer.step()
        read = watch.training(step=number).updates[weight]
        assert read.change == pytest.approx(moved.norm().item(), rel=1e-9)
        assert read.gradient == pytest.approx(gradient.norm().item(), rel=1e-12)


def test_micro_batches_accumulate_and_what_is_clipped_is_read_clipped():
    model = linear()
    backward(model)
    once = model.weight.grad.norm().item()
    backward(model)
    training, _ = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert training.updates[model.weight].gradient == pytest.approx(2 * once, rel=1e-12)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    training, _ = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    squares = [update.gradient**2 for update in training.updates.values()]
    assert math.sqrt(sum(squares)) == pytest.approx(0.5, rel=1e-5)


def test_a_gradient_that_a_closure_makes():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = OptimiserWatch([optimizer], every=1)

    def closure():
        optimizer.zero_grad()
        backward(model)

    backward(model, scale=100.0)
    optimizer.step(closure)
    read = watch.training(step=1).updates[model.weight]
    assert read.gradient == pytest.approx(model.weight.grad.norm().item())
    assert read.change == pytest.approx(0.1 * read.gradient)


def test_groups_have_rates_of_their_own_and_what_is_frozen_is_left_out():
    model = linear()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    unused = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD(
        [{"params": [model.weight]}, {"params": [model.bias, frozen, unused], "lr": 0.5}], lr=0.1
    )
    backward(model)
    training, _ = stepped(model, optimizer)
    rates = {parameter: update.learning_rate for parameter, update in training.updates.items()}
    assert rates == {model.weight: 0.1, model.bias: 0.5, unused: 0.5}
    assert training.updates[unused].gradient is None
    assert training.updates[unused].change == 0


def test_sparse_gradients_and_half_precision():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    training, _ = stepped(embedding, torch.optim.SGD(embedding.parameters(), lr=1.0))
    assert training.updates[embedding.weight].gradient == pytest.approx(math.sqrt(3 * 5))
    half = nn.Parameter(torch.full((400,), 2.0, dtype=torch.bfloat16))
    half.grad = torch.full_like(half, 0.5)
    training, _ = stepped(nn.ParameterList([half]), torch.optim.SGD([half], lr=1.0))
    # Their squares add up to 100, which bfloat16 would not reach.
    assert training.updates[half].gradient == pytest.approx(10.0)
    assert training.updates[half].change == pytest.approx(10.0)


def test_an_update_that_was_not_foreseen_is_not_told():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    watch = OptimiserWatch([optimizer])
    assert watch.training(step=0).why == NOT_YET
    watch.expect(True)
    optimizer.step()
    watch.expect(False)
    optimizer.step()
    # The one that was read is not the latest any more.
    assert watch.training(step=2).updates == {}
    assert watch.training(step=2).why == UNFORESEEN
    watch.expect(True)
    optimizer.step()
    assert watch.training(step=3).why == "ok"
    assert watch.training(step=3).why == UNFORESEEN


def test_one_in_so_many():
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    watch = OptimiserWatch([optimizer], every=3)
    read = []
    for step in range(1, 10):
        optimizer.step()
        if watch.training(step=step).updates:
            read.append(step)
    assert read == [3, 6, 9]


def test_training_is_the_same_and_the_hooks_are_gone():
    ends = []
    for watched in (False, True):
        model = linear()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        random = torch.get_rng_state()
        watch = OptimiserWatch([optimizer], every=2) if watched else None
        for _ in range(10):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), random)
        if watch is not None:
            assert optimizer._optimizer_step_pre_hooks
            watch.close()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        ends.append((model.state_dict(), optimizer.state_dict()))
    assert identical(ends[0], ends[1])


@pytest.mark.parametrize("where", ["clone", "norm"])
def test_what_fails_is_told_and_training_goes_on(where, monkeypatch):
    """Before the update, where there is no memory for a copy say, and after it."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    expected = model.weight.detach() - 0.1 * model.weight.grad

    def fail(*_, **__):
        raise RuntimeError("planted")

    watch = OptimiserWatch([optimizer], every=1)
    with monkeypatch.context() as patched:
        if where == "clone":
            patched.setattr(torch.Tensor, "clone", fail)
        else:
            patched.setattr(torch.linalg, "vector_norm", fail)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected)
    training = watch.training(step=1)
    assert (training.updates, training.why) == ({}, "RuntimeError: planted")
    assert [str(error) for error in watch.failures()] == ["planted"]
    assert watch.failures() == []
    optimizer.step()
    assert watch.training(step=2).why == "ok"


def test_steps_and_tokens_a_second_without_what_measuring_took():
    now = [0.0]
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = OptimiserWatch([optimizer], clock=lambda: now[0])
    first = watch.training(step=10, tokens=1_000)
    assert (first.steps_per_second, first.tokens_per_second) == (None, None)
    now[0] = 100.0
    watch.go_on(step=10, tokens=1_000)
    now[0] = 104.0
    then = watch.training(step=30, tokens=9_000)
    assert (then.steps_per_second, then.tokens_per_second) == (5.0, 2_000.0)
    assert watch.training(step=30).tokens_per_second is None
    assert watch.training(step=10).steps_per_second is None


def test_an_optimiser_within_another():
    """As accelerate's: it is an optimiser that has no hooks of its own."""

    class Wrapping(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step(closure)

    model = linear()
    backward(model)
    training, _ = stepped(model, Wrapping(torch.optim.SGD(model.parameters(), lr=0.1)))
    assert training.why == "ok"


# torch warns of what it does itself while it compiles.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
def test_a_compiled_step_is_read_and_compiled_once():
    model, compiled = linear(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def count(graph, _):
        compiled.append(graph)
        return graph

    step = torch.compile(optimizer.step, backend=count)
    watch = OptimiserWatch([optimizer], every=2)
    read = []
    for number in range(1, 13):
        optimizer.zero_grad()
        backward(model)
        step()
        read.append(bool(watch.training(step=number).updates))
    assert read == [False, True] * 6
    assert len(compiled) <= 2


def test_an_update_that_a_gradient_scaler_skips():
    model = linear().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch, scaler = OptimiserWatch([optimizer], every=1), torch.amp.GradScaler("cpu")
    said = []
    for loss_scale in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_scale * model(torch.ones(1, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        training = watch.training(step=1)
        said.append(training.why)
        if training.updates:
            # As the optimiser has it: not scaled.
            assert training.updates[model.bias].gradient == pytest.approx(math.sqrt(2))
    assert said == ["ok", UNFORESEEN, "ok"]


def test_two_optimisers():
    model = linear()
    first, second = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    watch = OptimiserWatch([first, second], every=1)
    backward(model)
    first.step()
    assert set(watch.training(step=1).updates) == {model.weight}
    first.step()
    second.step()
    assert set(watch.training(step=2).updates) == {model.weight, model.bias}


@pytest.mark.parametrize(
    ("arguments", "every", "message"),
    [
        ([], None, "got no optimiser; expected one or more torch.optim.Optimizer"),
        ([object()], None, "got object; expected one or more torch.optim.Optimizer"),
        (["real"], 0, "every=0; expected one update in how many is read"),
    ],
)
def test_what_is_no_optimiser(arguments, every, message):
    real = torch.optim.SGD(linear().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        OptimiserWatch([real if a == "real" else a for a in arguments], every=every)
