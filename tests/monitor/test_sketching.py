"""Digests and sketches of weights: what changes them and what does not, and that the distance of
two sketches is that of the weights.
"""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from monitor.sketching import PROJECTIONS, digest, sketch
from tests.callbacks.tiny import TinyLM


def model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return TinyLM().to(dtype)


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    squares = ((a.detach().double() - b.detach().double()).square().sum() for a, b in pairs)
    return float(sum(squares)) ** 0.5


def test_the_digest_is_that_of_names_types_shapes_and_bits():
    made = nn.Linear(2, 2)
    expected = hashlib.blake2b(digest_size=16)
    for name, shape in (("bias", "(2,)"), ("weight", "(2, 2)")):
        expected.update(f"{name} torch.float32 {shape}".encode())
        expected.update(getattr(made, name).detach().numpy().tobytes())
    assert digest(made) == expected.hexdigest()


def test_one_bit_changes_the_digest_and_nothing_else_does():
    one, other = model(), model()
    assert digest(one) == digest(other)
    one.eval().requires_grad_(requires_grad=False)
    one.register_buffer("counter", torch.ones(1))
    assert digest(one) == digest(other)
    with torch.no_grad():
        weight = other.unembedding.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert digest(one) != digest(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_type_of_parameter(dtype):
    made = model(dtype=dtype)
    assert digest(made) == digest(model(dtype=dtype)) != digest(model(1, dtype))
    assert sketch(made).isfinite().all()


def test_parameters_without_elements_and_tied_ones():
    empty = nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3))])
    assert len(digest(empty)) == 32
    tied = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    tied[1].weight = tied[0].weight
    alone = nn.ModuleList([tied[0]])
    assert torch.equal(sketch(tied), sketch(alone))


def test_the_distance_of_sketches_is_that_of_weights():
    """To within some 1 / √(2 · 512) of it, where there are rows enough to add up."""
    ratios = []
    for seed in range(40):
        one, other = (nn.Linear(512, 1_024) for _ in range(2))
        with torch.no_grad():
            random = torch.Generator().manual_seed(seed)
            other.weight.copy_(one.weight + torch.randn(one.weight.shape, generator=random))
        estimated = float((sketch(one) - sketch(other)).norm())
        ratios.append(estimated / distance(one, other))
    assert np.mean(ratios) == pytest.approx(1, abs=0.02)
    assert np.std(ratios) < 1.6 / (2 * PROJECTIONS) ** 0.5


def test_impostor_a_change_of_all_weights_at_once():
    """A shift by a constant is no noise; random signs take it for what it is."""
    one = nn.Linear(512, 1_024, bias=False)
    shifted = nn.Linear(512, 1_024, bias=False)
    with torch.no_grad():
        shifted.weight.copy_(one.weight + 0.01)
    assert float((sketch(one) - sketch(shifted)).norm()) == pytest.approx(
        distance(one, shifted), rel=0.15
    )


def test_no_random_stream_is_drawn_from():
    made = model()
    before = torch.get_rng_state()
    sketch(made)
    digest(made)
    assert torch.equal(torch.get_rng_state(), before)
