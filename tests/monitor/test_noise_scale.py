"""The gradient noise scale against what is known in closed form: of Gaussian gradients, and of a
linear regression, where it goes down with the size of batches as it must. Where nothing can be
told it is not; gradients are seen as they come, and training is left as it was.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from monitor.noise_scale import (
    NO_SIGNAL,
    ONE_BATCH,
    TOO_FEW,
    UNEVEN,
    MicroBatches,
    noise_scale,
    project,
)
from monitor.optimising import SEVERAL, OptimiserWatch
from tests.callbacks.tiny import TinyLM, identical, text


def drawn(*, scale, batches, seed, spectrum=0.0, size=1_000):
    """Gradients of micro-batches whose noise scale is known; `spectrum` makes few directions noisy.
    Beside that ‖G‖², and tr Σ.
    """
    random = torch.Generator().manual_seed(seed)
    noisy = torch.arange(1, size + 1).double() ** -spectrum
    variance = noisy.square().sum().item()
    mean = torch.randn(size, generator=random).double() * noisy
    mean *= math.sqrt(variance / scale) / mean.norm()
    noise = torch.randn(batches, size, generator=random).double()
    return mean + noise * noisy, variance / scale, variance


@pytest.mark.parametrize("spectrum", [0.0, 0.5])
@pytest.mark.parametrize(("batches", "scale"), [(4, 0.3), (8, 3.0), (16, 3.0), (16, 30.0)])
def test_both_parts_are_without_bias_and_the_error_is_the_scatter(batches, scale, spectrum):
    signals, variances, errors = [], [], []
    for seed in range(300):
        gradients, signal, variance = drawn(
            scale=scale, batches=batches, seed=seed, spectrum=spectrum
        )
        # As a mean of losses has them.
        found = noise_scale(gradients / batches)
        signals.append(found.signal / signal)
        variances.append(found.variance / variance)
        errors.append(found.signal_stderr / signal)
    for found in (signals, variances):
        assert np.mean(found) == pytest.approx(1, abs=4 * np.std(found) / math.sqrt(300))
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(signals), rel=0.35)


@pytest.mark.parametrize(("batches", "scale"), [(4, 0.3), (8, 3.0), (16, 3.0)])
def test_what_is_told_is_so(batches, scale):
    inside, told = 0, 0
    for seed in range(200):
        found = noise_scale(drawn(scale=scale, batches=batches, seed=seed, spectrum=0.3)[0])
        if found.why == "ok":
            told += 1
            distance = stdtrit(batches - 1, 0.975) * found.scale_stderr
            inside += abs(found.scale - scale) <= distance
    assert told >= 0.9 * 200
    assert inside >= 0.92 * told


def test_noise_alone_tells_of_no_scale():
    told = 0
    for seed in range(500):
        found = noise_scale(drawn(scale=1e12, batches=8, seed=seed, spectrum=0.5)[0])
        assert found.why in {"ok", NO_SIGNAL}
        assert (found.scale is None) == (found.why == NO_SIGNAL)
        told += found.why == "ok"
    assert told <= 5


def test_each_part_averaged_over_updates_tells_what_one_update_cannot():
    """And the mean of the ratios of single updates would not."""
    found = [noise_scale(drawn(scale=10.0, batches=4, seed=seed)[0]) for seed in range(200)]
    assert sum(one.why == NO_SIGNAL for one in found) >= 100
    variance = np.mean([one.variance for one in found])
    assert variance / np.mean([one.signal for one in found]) == pytest.approx(10, rel=0.1)


def test_too_few_and_what_is_not_finite():
    gradients, *_ = drawn(scale=1.0, batches=4, seed=0)
    assert noise_scale(gradients[:1]).why == ONE_BATCH
    two = noise_scale(gradients[:2])
    assert (two.why, two.scale, two.signal_stderr) == (TOO_FEW, None, None)
    assert two.signal == pytest.approx(4 * (gradients[0] @ gradients[1]).item())
    gradients[2, 5] = math.inf
    assert noise_scale(gradients).why == "its gradients are not finite"


def test_where_there_is_no_noise_there_is_no_scale():
    found = noise_scale(torch.ones(4, 100))
    assert (found.scale, found.variance) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    assert noise_scale(torch.zeros(4, 100)).why == NO_SIGNAL


class Regression:
    """Linear regression on Gaussian inputs, whose noise scale is known: with errors of variance s²
    and weights off by e, the gradient of one sample is x (x·e + noise), its mean is e, and tr Σ is
    (size + 1) ‖e‖² + size s² (fourth moments of Gaussians).
    """

    def __init__(self, *, size=300, noise=2.0, seed=0):
        torch.manual_seed(seed)
        self.layer = nn.Linear(size, 1, bias=False)
        self.off, self.noise = self.layer.weight.detach().clone(), noise
        self.random = torch.Generator().manual_seed(seed)
        squared = self.off.square().sum().item()
        self.scale = ((size + 1) * squared + size * noise**2) / squared

    def backward(self, samples, share=1.0):
        inputs = torch.randn(samples, self.off.shape[1], generator=self.random)
        targets = self.noise * torch.randn(samples, 1, generator=self.random)
        (share * 0.5 * (self.layer(inputs) - targets).square().mean()).backward()


@pytest.mark.parametrize("samples", [500, 1_000, 4_000])
def test_a_linear_regression(samples):
    """In batches: twice as large ones need half as many."""
    known = Regression()
    seen, found = MicroBatches(), []
    for _ in range(40):
        seen.begin([known.layer.weight])
        for _ in range(8):
            known.backward(samples, share=1 / 8)
        found.append(seen.end())
        known.layer.zero_grad()
    signal = np.mean([one.signal for one in found])
    assert signal == pytest.approx(known.off.square().sum().item(), rel=0.1)
    ratio = np.mean([one.variance for one in found]) / signal
    assert ratio * samples == pytest.approx(known.scale, rel=0.1)
    if samples == 4_000:
        assert {one.why for one in found} == {"ok"}
        scales = [one.scale * samples for one in found]
        assert np.mean(scales) == pytest.approx(known.scale, rel=0.1)


def test_why_consecutive_updates_are_no_micro_batches():
    """Where descent has settled in a bowl the product of consecutive gradients is on average minus
    what ‖G‖² is.
    """
    random, rate, curvature = np.random.default_rng(0), 0.01, 1.0
    weight, gradients, true = np.zeros(200), [], []
    for _ in range(6_000):
        gradients.append(curvature * weight + random.normal(size=200))
        true.append((curvature * weight) @ (curvature * weight))
        weight = weight - rate * gradients[-1]
    products = [a @ b for a, b in itertools.pairwise(gradients[1_000:])]
    assert np.mean(true[1_000:]) == pytest.approx(rate * 200 / 2, rel=0.1)
    assert np.mean(products) == pytest.approx(-rate * 200 / 2, rel=0.5)


@pytest.mark.parametrize("size", [(3, 5), (16_381,), (400, 300), (1_200, 500)])
def test_products_of_sketches_are_those_of_gradients(size):
    torch.manual_seed(0)
    # Of few directions, whose columns and rows are alike.
    a, b = (torch.randn(size) + torch.randn(size[-1]) for _ in range(2))
    exact = (a * b).sum().item(), a.square().sum().item()
    assert project(a, seed=1) @ project(a, seed=1) == pytest.approx(exact[1], rel=0.04)
    products = [(project(a, seed=s) @ project(b, seed=s)).item() for s in range(30)]
    scatter = a.norm().item() * b.norm().item() / math.sqrt(16_381)
    assert np.mean(products) == pytest.approx(exact[0], abs=4 * scatter / math.sqrt(30) + 1e-3)
    assert np.std(products) <= 2 * scatter + 1e-6


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_gradients_of_a_model_are_seen_one_by_one():
    """Scaled, clipped and averaged afterwards, they are seen as they came; parameters that are not
    used, and others, do not matter.
    """
    torch.manual_seed(0)
    model = TinyLM()
    unused, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    seen, exact = MicroBatches(), []
    seen.begin([*model.parameters(), unused, frozen])
    for batch in range(6):
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        loss_of(model, batch).backward()
        exact.append(
            flat(
                p.grad if old is None else p.grad - old
                for p, old in zip(model.parameters(), before, strict=True)
            )
        )
        model.zero_grad(set_to_none=batch % 2 == 0)
    found, expected = seen.end(), noise_scale(torch.stack(exact))
    assert seen.end().why == ONE_BATCH
    assert found.why == expected.why == "ok"
    for name in ("signal", "variance", "scale"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.1)
    assert seen.seconds > 0


def loss_of(model, seed):
    tokens = text(4, seed=seed)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def test_a_parameter_that_is_used_in_some_batches_only():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    seen = MicroBatches()
    seen.begin([first, second])
    for batch in range(4):
        (first.sum() + (second.sum() if batch else 0)).backward()
    assert seen.end().why == UNEVEN


def test_what_fails_is_said_and_training_goes_on(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("planted")

    weight = nn.Parameter(torch.ones(2))
    seen = MicroBatches()
    seen.begin([weight])
    monkeypatch.setattr("monitor.noise_scale.project", fail)
    weight.sum().backward()
    assert weight.grad.tolist() == [1.0, 1.0]
    assert seen.end().why == "RuntimeError: planted"


@pytest.mark.parametrize("announced", [True, False])
def test_the_watch_tells_of_the_updates_that_are_read(announced):
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = OptimiserWatch([optimizer], every=None if announced else 3)
    told = []
    for update in range(1, 7):
        for batch in range(4):
            # Said again, it forgets none of them.
            watch.expect(announced and update % 3 == 0)
            loss_of(model, 4 * update + batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        told.append(watch.training(step=update).noise)
    assert [one.signal is not None for one in told] == [False, False, True] * 2
    # Not that of what was clipped.
    assert told[2].signal > 1e-4
    watch.close()
    loss_of(model, 0).backward()


def test_of_two_optimisers_nothing_is_told():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    watch = OptimiserWatch([torch.optim.SGD([weight], lr=0.1) for weight in weights], every=1)
    assert watch.training(step=0).noise.why == SEVERAL


# torch warns of what it does itself while it compiles.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
def test_a_compiled_model_is_seen_and_not_compiled_again():
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend("aot_eager"), TinyLM()
    compiled, weights = torch.compile(model, backend=counter), list(model.parameters())
    seen, told = MicroBatches(), []
    loss_of(compiled, 0).backward()
    frames = counter.frame_count
    for wanted in (weights, [], weights):
        seen.begin(wanted)
        for batch in range(4):
            loss_of(compiled, batch).backward()
        told.append(seen.end().signal)
    assert counter.frame_count == frames >= 1
    assert (told[1], told[2]) == (None, told[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("batches", [1, 4])
def test_training_is_the_same(batches):
    """With dropout, to the bit."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = TinyLM(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        watch = OptimiserWatch([optimizer], every=1) if watched else None
        for update in range(10):
            for batch in range(batches):
                (loss_of(model, batches * update + batch) / batches).backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch is not None:
                expected = {ONE_BATCH} if batches == 1 else {"ok", NO_SIGNAL}
                assert watch.training(step=update).noise.why in expected
        ends.append((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    assert identical(ends[0], ends[1])
