"""Random walks on losses whose learning coefficient is known: bowls by a closed form, singular ones
by sums over a grid; and what they must not be taken for.

What is alike and independent adds up, so that many copies in one walk stand for a long one.
"""

import math
from dataclasses import replace

import pytest
import torch

from monitor.streams import UnseenError
from monitor.walks import Options, Sampled, effective_draws, prepared, walked
from tests.monitor.walks.potentials import Written, bowl
from tests.oracles import walks as oracle

COPIES = 100
LONG = Options(chains=4, burn_in=200, draws=400, inverse_temperature=100.0)


def sampled(potential, options: Options) -> Sampled:
    setting = prepared(potential, options)
    chains = [walked(potential, setting, options, number) for number in range(options.chains)]
    return Sampled(setting=setting, chains=tuple(chains))


def estimate(made: Sampled) -> tuple[float, float]:
    """λ̂ of a copy, and its error."""
    rises = torch.stack([chain.rise for chain in made.chains]) / COPIES
    return rises.mean().item(), (rises.var() / effective_draws(rises)).sqrt().item()


@pytest.mark.parametrize(("localisation", "expected"), [(0.0, 5.128), (100.0, 2.632)])
def test_a_bowl_has_the_closed_form(localisation, expected):
    options = replace(LONG, step_size=1e-3, localisation=localisation)
    made = sampled(bowl(torch.ones(10 * COPIES)), options)
    value, error = estimate(made)
    assert error < 0.04
    assert value == pytest.approx(expected, abs=4 * error)
    # All directions alike: it is its own null.
    assert made.setting.null == pytest.approx(COPIES * expected, rel=1e-3)
    assert made.setting.null_sd == pytest.approx(0, abs=1e-2)
    assert not any(chain.diverged(made.setting) for chain in made.chains)


def test_a_bowl_with_few_steep_directions_is_below_its_null():
    curvatures = torch.cat([torch.full((5,), 10.0), torch.full((45,), 1e-3)])
    options = replace(LONG, localisation=100.0)
    made = sampled(bowl(curvatures.repeat(COPIES)), options)
    value, error = estimate(made)
    a = 100 * curvatures + 100
    expected = (50 * curvatures / (a * (1 - made.setting.step_size * a / 4))).sum()
    assert value == pytest.approx(float(expected), abs=4 * error)
    assert 2 < value < 3
    mean = curvatures.mean()
    a_mean = 100 * mean + 100
    of_mean = 50 * 50 * mean / (a_mean * (1 - made.setting.step_size * a_mean / 4))
    assert made.setting.null == pytest.approx(COPIES * float(of_mean), rel=0.01)
    assert made.setting.null > 4 * COPIES * value
    # A tenth of what is stable in the steepest direction.
    assert made.setting.step_size * float(a.max()) == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("power", [2, 4, 6])
def test_one_direction_adds_one_over_its_power(power):
    """E nβ w^p = 1/p at any temperature: 1/2, 1/4 and 1/6."""
    lines = Written(start=torch.zeros(COPIES), loss=lambda w: (w**power).sum())
    steps = {2: 5e-4, 4: 3e-3, 6: 5e-3}
    options = replace(LONG, burn_in=800, step_size=steps[power], localisation=0.0)
    value, error = estimate(sampled(lines, options))
    assert error < 0.03 / power
    # Steps of this size are off by a few hundredths.
    assert value == pytest.approx(1 / power, abs=4 * error + 0.06 / power)
    assert oracle.expected(lambda w: w**power, 100, 0, 1, 4.0) == pytest.approx(1 / power, rel=1e-3)


@pytest.mark.parametrize("powers", [(2, 2), (4, 2), (6, 2)])
def test_normal_crossings_are_as_summed_over_a_grid(powers):
    p, q = powers

    def loss(a, b):
        return a**p * b**q

    crossings = Written(
        start=torch.zeros(2 * COPIES), loss=lambda w: loss(w[:COPIES], w[COPIES:]).sum()
    )
    options = replace(LONG, burn_in=800, draws=600, step_size=2e-3, localisation=5.0)
    value, error = estimate(sampled(crossings, options))
    expected = oracle.expected(loss, 100, 5.0, 2, 4.0)
    assert error < 0.06 * expected
    assert value == pytest.approx(expected, abs=4 * error + 0.05 * expected)
    # Fewer than two directions that matter would have in a bowl, and towards 1/p as n grows.
    assert value < 0.5
    towards = [oracle.expected(loss, 100 * 1e3**k, 5.0, 2, 3.0) for k in range(2)]
    assert abs(towards[1] - 1 / p) < abs(towards[0] - 1 / p)


def test_steps_that_are_too_large_diverge():
    steep = bowl(torch.ones(10))
    made = sampled(steep, replace(LONG, step_size=0.05, localisation=10.0))
    assert all(chain.diverged(made.setting) for chain in made.chains)
    assert any(chain.rise.isnan().any() for chain in made.chains)
    assert made.setting.null is None


def test_a_slope_that_leads_away_is_far_or_negative():
    """Where w₀ is no minimum, walks go where the loss is lower."""
    aside = bowl(torch.ones(10), start=torch.full((10,), 2.0))
    made = sampled(aside, replace(LONG, localisation=10.0))
    value, error = estimate(made)
    assert value < -5 * error
    cliff = Written(start=torch.zeros(10), loss=lambda w: 5 * w.sum() + 1e-3 * (w**2).sum())
    made = sampled(cliff, replace(LONG, localisation=10.0))
    assert all(chain.diverged(made.setting) for chain in made.chains)


def test_few_items_at_a_time_give_much_the_same():
    """Their noise heats, by little where steps are small; the loss at w₀ cancels item by item."""
    noise = 0.3 * torch.randn(16, 10 * COPIES, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(0)
    options = replace(LONG, step_size=5e-4, localisation=100.0)
    noisy = bowl(torch.ones(10 * COPIES), noise=noise)
    few, error = estimate(sampled(noisy, options))
    whole, of_whole = estimate(sampled(noisy, replace(options, one_in=1)))
    # A quarter of the items, drawn without replacement.
    heated = 1 + 5e-4 / 4 * 100**2 * float((noise.var(0) / 4 * (1 - 4 / 16)).mean())
    assert few == pytest.approx(whole * heated, abs=4 * math.hypot(error, of_whole))
    assert 1.01 < heated < 1.05


def test_a_walk_is_the_same_whoever_makes_it():
    potential = bowl(torch.ones(3), start=torch.ones(3))
    options = replace(LONG, burn_in=5, draws=5)
    setting = prepared(potential, options)
    before, stream = potential.start.clone(), torch.get_rng_state()
    first, again, other = (walked(potential, setting, options, number) for number in (1, 1, 2))
    assert torch.equal(first.rise, again.rise)
    assert not torch.equal(first.rise, other.rise)
    assert torch.equal(potential.start, before)
    assert torch.equal(torch.get_rng_state(), stream)


def test_what_has_no_scale_is_refused():
    with pytest.raises(UnseenError, match="all weights are zero"):
        prepared(bowl(torch.ones(3)), Options())
    flat = Written(start=torch.ones(3), loss=lambda w: 0 * w.sum())
    with pytest.raises(UnseenError, match="curvature found is 0"):
        prepared(flat, Options(localisation=0.0))
    broken = Written(start=torch.ones(3), loss=lambda w: torch.nan * w.sum())
    with pytest.raises(UnseenError, match="not finite"):
        prepared(broken, Options())


def test_by_itself_localisation_lets_weights_wander_by_a_tenth():
    nearly_flat = bowl(torch.full((50,), 1e-9), start=torch.full((50,), 3.0))
    made = sampled(nearly_flat, Options(burn_in=100, draws=2000))
    assert made.setting.localisation == pytest.approx((0.3) ** -2)
    squares = torch.stack([chain.distance for chain in made.chains]).square().mean() / 50
    # The steps themselves make it 1/(1 − εγ/4) times as much.
    assert float(squares) == pytest.approx(0.3**2 / 0.9, rel=0.05)
    assert made.setting.inverse_temperature == pytest.approx(1000 / math.log(1000))


def test_options_say_what_they_cost():
    assert Options().passes(16, 4) == 25 + 4 * 160 / 4
    assert Options().passes(2, 1) == 25 + 160 / 2
