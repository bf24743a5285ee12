"""The sparse autoencoder: against one written out token by token, autograd and torch's Adam, on
activations whose dictionary is known, and on noise that has none.
"""

import dataclasses

import numpy as np
import pytest
import torch

from monitor.dictionary import SparseAutoencoder, Training, train
from monitor.dictionary.sae import _adam
from tests.oracles import dictionary as oracle

BRIEF = Training(active=4, seconds=None)


@pytest.fixture(scope="module")
def found() -> tuple[torch.Tensor, torch.Tensor, SparseAutoencoder]:
    """True directions, tokens that were not trained on, and what was trained on others."""
    directions, rows = oracle.planted()
    sae, _ = train(rows[:6144], BRIEF)
    return directions, rows[6144:], sae


def explained(sae: SparseAutoencoder, rows: torch.Tensor) -> float:
    return oracle.explained(rows.numpy(), sae.decode(sae.encode(rows)).numpy())


def test_it_says_what_one_written_out_says(found):
    _, rows, sae = found
    codes = sae.encode(rows[:50])
    made = sae.decode(codes)
    for row, code, back in zip(rows[:50].numpy(), codes, made, strict=True):
        fires = oracle.encoded(sae, row)
        assert set(fires) == set(code.nonzero().flatten().tolist())
        np.testing.assert_allclose([float(code[f]) for f in fires], [*fires.values()], atol=1e-4)
        np.testing.assert_allclose(back, oracle.decoded(sae, fires), atol=1e-4)


def test_gradients_are_those_of_autograd(found):
    _, rows, sae = found
    rows = sae._moved(rows[:64]).double()
    names = ("encoder", "encoder_bias", "decoder", "bias")
    leaves = {name: getattr(sae, name).double().requires_grad_() for name in names}
    answers = (rows - leaves["bias"]) @ leaves["encoder"].T + leaves["encoder_bias"]
    best = answers.topk(sae.active).values[:, -1:]
    codes = torch.where(answers >= best, answers, 0).relu()
    loss = (codes @ leaves["decoder"] + leaves["bias"] - rows).square().sum(1).mean()
    expected = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    plain = {name: leaf.detach() for name, leaf in leaves.items()}
    said, gradients = dataclasses.replace(sae, **plain).gradients(rows)
    torch.testing.assert_close(said, loss.detach())
    assert gradients.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(gradients[name], expected[name])


def test_adam_is_that_of_torch():
    random = torch.Generator().manual_seed(0)
    ours, theirs = torch.ones(5), torch.ones(5, requires_grad=True)
    moments = [torch.zeros(5), torch.zeros(5)]
    optimizer = torch.optim.Adam([theirs], lr=0.1)
    for step in range(1, 20):
        gradient = torch.randn(5, generator=random)
        ours -= 0.1 * _adam(moments, gradient, step)
        theirs.grad = gradient
        optimizer.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_planted_directions_are_found(found):
    directions, rows, sae = found
    nearest = (directions @ sae.decoder.T).max(1).values
    assert nearest.mean() > 0.98
    assert nearest.min() > 0.9
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(len(sae.decoder)))
    assert explained(sae, rows) > 0.88


def test_planted_directions_are_not_found_before_training():
    directions, rows = oracle.planted()
    sae, steps = train(rows, dataclasses.replace(BRIEF, steps=1))
    assert steps == 1
    assert (directions @ sae.decoder.T).max(1).values.mean() < 0.7


def test_noise_is_explained_less_well_however_much_that_is(found):
    """Isotropic noise has no dictionary, and yet a good part of its variance is explained."""
    _, rows, sae = found
    noise = torch.randn(8192, 32, generator=torch.Generator().manual_seed(1))
    of_noise, _ = train(noise[:6144], BRIEF)
    assert 0.3 < explained(of_noise, noise[6144:]) < explained(sae, rows) - 0.2


def test_the_same_rows_give_the_same_and_no_stream_moves():
    _, rows = oracle.planted(tokens=512)
    state = torch.get_rng_state()
    first, again = (train(rows, BRIEF)[0] for _ in range(2))
    assert torch.equal(first.decoder, again.decoder)
    assert torch.equal(first.encoder, again.encoder)
    assert torch.equal(state, torch.get_rng_state())
    other, _ = train(rows, dataclasses.replace(BRIEF, seed=1))
    assert not torch.equal(first.decoder, other.decoder)


def test_it_goes_on_from_where_it_was(found):
    _, rows, sae = found
    before = sae.decoder.clone()
    further, _ = train(rows, dataclasses.replace(BRIEF, firings=16), start=sae)
    assert torch.equal(sae.decoder, before), "what it starts from is left as it is"
    assert (further.decoder * before).sum(1).mean() > 0.9
    fresh, _ = train(rows[:, :16], BRIEF, start=sae)
    assert fresh.decoder.shape[1] == 16, "of another shape there is nothing to go on from"


def test_time_ends_it_after_a_step_and_stop_as_if_it_had():
    _, rows = oracle.planted(tokens=512)
    hasty, steps = train(rows, dataclasses.replace(BRIEF, seconds=0.0))
    assert steps == 1
    stopped, steps = train(rows, BRIEF, stop=1)
    assert steps == 1
    assert torch.equal(hasty.decoder, stopped.decoder)


def test_rows_that_are_all_the_same():
    sae, _ = train(torch.full((128, 8), 2.0), BRIEF)
    torch.testing.assert_close(
        sae.decode(sae.encode(torch.full((1, 8), 2.0))), torch.full((1, 8), 2.0)
    )


def test_settings_of_no_use_are_refused():
    with pytest.raises(ValueError, match="steps=0: expected at least 1"):
        Training(steps=0)
