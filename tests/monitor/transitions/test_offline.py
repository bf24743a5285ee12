"""`fit`: noiseless curves give back their numbers; trends, waves, spikes and wandering noise are no
transitions; intervals hold the truth; recorded trainings show theirs where it was.
"""

import dataclasses

import numpy as np
import pytest

from monitor.transitions import Transition, fit
from monitor.transitions.curves import BEFORE, rise
from tests.trajectories import NOISES, NULLS, noise, null, recorded, sigmoid

QUANTITIES = ("onset", "midpoint", "end", "width", "height")


def interval(transition, name):
    return getattr(transition, f"{name}_low"), getattr(transition, f"{name}_high")


def noisy(kind="white", *, length=150, seed=0, **curve):
    curve = {"midpoint": 70, "width": 12, "height": 10} | curve
    return sigmoid(length, **curve) + noise(kind, length, np.random.default_rng(seed))


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("form", BEFORE)
def test_a_curve_without_noise_gives_its_numbers_back(form, direction):
    step = np.arange(0, 1500, 10)
    sign = 1 if direction == "up" else -1
    value = 5 + sign * 0.7 * rise(form, step, np.array([600.0]), np.array([130.0]))[0]

    (found,) = fit(step, value)

    assert found.direction == direction
    onset = 600 - 130 * BEFORE[form]
    for name, truth in zip(QUANTITIES, (onset, 600, onset + 130, 130, 0.7), strict=True):
        assert getattr(found, name) == pytest.approx(truth, rel=1e-3)
        low, high = interval(found, name)
        assert low == pytest.approx(high, rel=1e-2)
    assert (found.validity, found.n, found.resolution) == ("ok", 150, 10)
    assert found.delta_bic > 100
    assert not found.sharp


@pytest.mark.parametrize(("scale", "offset"), [(1e-30, 0), (1e30, 0), (1, 1e6), (1e300, 0)])
@pytest.mark.parametrize("pace", [1e-3, 1e12])
def test_units_do_not_matter(scale, offset, pace):
    value = noisy()
    (plain,) = fit(np.arange(150), value)

    (found,) = fit(1 + pace * np.arange(150), scale * value + offset)

    for name in ("onset", "midpoint", "end"):
        assert getattr(found, name) == pytest.approx(1 + pace * getattr(plain, name), rel=1e-3)
    assert found.height == pytest.approx(scale * plain.height, rel=1e-3)
    assert found.noise == pytest.approx(scale * plain.noise, rel=1e-3)
    assert found.delta_bic == pytest.approx(plain.delta_bic, abs=0.1)


def test_irregular_steps_and_values_that_are_missing():
    rng = np.random.default_rng(1)
    step = np.sort(rng.choice(2000, 150, replace=False))
    value = 10 * rise("logistic", step, np.array([900.0]), np.array([150.0]))[0]
    value = value + noise("white", 150, rng)
    value[[0, 20, 90]] = np.nan, np.inf, np.nan

    (found,) = fit(step, value)
    kept = np.isfinite(value)

    assert [found] == fit(step[kept], value[kept])
    assert abs(found.midpoint - 900) < 40
    assert found.n == 147
    after = np.searchsorted(step[kept], found.midpoint)
    assert found.resolution == np.diff(step[kept])[after - 1]


@pytest.mark.parametrize("kind", NOISES)
def test_every_transition_of_a_series_is_found(kind):
    value = noisy(kind, length=200, midpoint=40, width=8, height=12, seed=3)
    value += sigmoid(200, midpoint=100, width=5, height=-12)
    value += sigmoid(200, midpoint=150, width=12, height=14)

    found = fit(np.arange(200), value)

    assert [each.direction for each in found] == ["up", "down", "up"]
    for each, midpoint in zip(found, (40, 100, 150), strict=True):
        assert abs(each.midpoint - midpoint) < 4


def test_a_rise_and_a_fall_that_undo_each_other():
    value = noisy(midpoint=60, width=5) + sigmoid(150, midpoint=85, width=5, height=-10)

    up, down = fit(np.arange(150), value)

    assert (up.direction, down.direction) == ("up", "down")
    assert abs(up.midpoint - 60) < 2
    assert abs(down.midpoint - 85) < 2


def test_a_step_between_two_measurements_is_no_wider_than_they_are_apart():
    value = np.where(np.arange(100) < 50, 0.0, 10.0)
    value += noise("white", 100, np.random.default_rng(5))

    (found,) = fit(np.arange(100), value)

    assert found.sharp
    assert 48.5 < found.midpoint_low < 49.5 < found.midpoint_high < 50.5
    assert found.width_low < found.resolution == 1
    assert found.width_high < 4


def test_what_began_before_the_first_measurement_is_open_there():
    (found,) = fit(np.arange(150), noisy(midpoint=12, width=40, height=25))

    assert found.validity == "began before the first measurement"
    assert np.isnan([found.onset, found.width, found.height]).all()
    assert (found.onset_low, found.width_high, found.height_high) == (-np.inf, np.inf, np.inf)
    assert found.onset_high > found.onset_low
    assert found.midpoint_low < 12 < found.midpoint_high
    assert found.end_low < 32 < found.end_high


def test_what_has_not_ended_by_the_last_measurement_is_open_there():
    (found,) = fit(np.arange(150), noisy(midpoint=137, width=40, height=25))

    assert found.validity == "not ended by the last measurement"
    assert np.isnan([found.end, found.width, found.height]).all()
    assert (found.end_high, found.width_high, found.height_high) == (np.inf, np.inf, np.inf)
    assert found.midpoint_low < 137 < found.midpoint_high
    assert found.onset_low < 117 < found.onset_high


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(50),
        np.full(50, 0.1),
        np.full(50, np.nan),
        1e9 + 1e-6 * (np.arange(50) % 2),
        [],
        np.arange(7.0) > 3,
    ],
    ids=["zero", "constant", "nothing finite", "rounding", "empty", "few"],
)
def test_nothing_is_said_of(value):
    assert fit(np.arange(len(value)), np.asarray(value, dtype=float)) == []


def test_a_few_measurements_are_enough_where_it_is_plain():
    value = np.where(np.arange(12) < 6, 0.0, 10.0)
    value += 0.01 * noise("white", 12, np.random.default_rng(0))

    (found,) = fit(np.arange(12), value)

    assert 5 <= found.midpoint <= 6
    assert found.n == 12


def test_a_few_measurements_of_noise_show_nothing():
    found = 0
    for seed in range(5):
        for kind in NOISES:
            rng = np.random.default_rng(seed)
            found += len(fit(np.arange(10), noise(kind, 10, rng), resamples=1))

    assert found == 0


@pytest.mark.parametrize("kind", NULLS)
def test_what_is_no_transition_is_not_declared(kind):
    found = 0
    for around in NOISES:
        for seed in range(2):
            rng = np.random.default_rng([seed, 1])
            value = null(kind, 150, rng) + noise(around, 150, rng)
            found += len(fit(np.arange(150), value, resamples=1))

    assert found <= 1


@pytest.mark.parametrize("kind", ["ramp", "decay", "log", "spike", "slow_wave"])
def test_nor_without_noise(kind):
    assert fit(np.arange(120), null(kind, 120, np.random.default_rng(0))) == []


@pytest.mark.parametrize("height", [5, 7, 9, 12])
def test_one_or_two_measurements_are_no_level(height):
    for long in (1, 2):
        value = noise("white", 150, np.random.default_rng(height))
        value[146 : 146 + long] += height

        assert fit(np.arange(150), value, resamples=1) == []


def test_a_spike_is_left_out_and_changes_nothing():
    value = noisy()
    spiked = value.copy()
    spiked[110] = -40

    (found,), (plain,) = fit(np.arange(150), spiked), fit(np.arange(150), value)

    assert found.n == 149
    assert found.midpoint == pytest.approx(plain.midpoint, abs=0.3)
    assert found.height == pytest.approx(plain.height, abs=0.3)


def test_noise_that_comes_with_the_rise_is_no_spikes():
    at = np.arange(150)
    later = noise("white", 150, np.random.default_rng(4)) * (at > 100)

    (found,) = fit(at, sigmoid(150, midpoint=100, width=4, height=10) + later)

    assert found.n >= 149
    assert found.noise == pytest.approx(np.sqrt(1 / 3), rel=0.25)
    assert found.midpoint == pytest.approx(100, abs=1)


def test_too_low_a_rise_does_not_count():
    low = fit(np.arange(150), noisy(height=3, width=3))
    (enough,) = fit(np.arange(150), noisy(height=8, width=3))

    assert low == []
    assert enough.sharp
    assert enough.height > 5 * enough.noise


def test_the_evidence_that_is_asked_for():
    (found,) = fit(np.arange(150), noisy())

    assert fit(np.arange(150), noisy(), min_delta_bic=found.delta_bic - 0.01) == [found]
    assert fit(np.arange(150), noisy(), min_delta_bic=found.delta_bic + 0.01) == []


@pytest.mark.parametrize("kind", NOISES)
def test_intervals_hold_the_truth(kind):
    rng = np.random.default_rng(11)
    held, midpoints = [], []
    for _ in range(8):
        width, height = rng.uniform(2, 25), rng.uniform(8, 20)
        value = sigmoid(120, midpoint=60, width=width, height=height) + noise(kind, 120, rng)
        truth = (60 - width / 2, 60, 60 + width / 2, width, height)
        for found in fit(np.arange(120), value, resamples=400)[:1]:
            bounds = [interval(found, name) for name in QUANTITIES]
            held += [low <= true <= high for (low, high), true in zip(bounds, truth, strict=True)]
            midpoints.append(found.midpoint_high - found.midpoint_low)

    assert len(midpoints) >= 6
    assert np.mean(held) > 0.87
    assert np.median(midpoints) < 10


def test_the_seed_decides_the_draws_and_nothing_else():
    step, value = np.arange(150), noisy()
    before = value.copy()
    (first,), (again,), (other,) = (fit(step, value, seed=seed) for seed in (0, 0, 1))

    assert first == again
    assert first != other
    assert first.midpoint == other.midpoint
    assert first.midpoint_low == pytest.approx(other.midpoint_low, abs=0.3)
    assert (value == before).all()


def test_along_the_logarithm_of_the_step():
    step = np.concatenate([[0], np.geomspace(10, 100_000, 120)])
    value = 10 * rise(
        "logistic", np.log(np.maximum(step, 1)), np.array([np.log(2000)]), np.array([0.5])
    )
    value = value[0] + noise("white", 121, np.random.default_rng(2))
    value[0] = 1000

    (found,) = fit(step, value, axis="log_step")

    assert found.n == 120
    assert found.midpoint == pytest.approx(2000, rel=0.1)
    assert found.onset == pytest.approx(2000 / np.exp(0.25), rel=0.1)
    assert found.end == pytest.approx(2000 * np.exp(0.25), rel=0.1)
    assert found.width == pytest.approx(found.end - found.onset)
    for name in QUANTITIES:
        low, high = interval(found, name)
        assert low < getattr(found, name) < high


# When 10% and 50% of the rise of `max_ind` are gone in the recordings, counted from its first value
# to its mean after the rise: by eye, hence the tolerances.
@pytest.mark.parametrize(
    ("name", "onset", "midpoint"),
    [
        ("blocks_2L_s0", (140, 175), (180, 215)),
        ("blocks_2L_s1", (160, 190), (195, 225)),
        ("markov_2L_s0", (40, 110), (115, 150)),
        ("text_plain_2L_s0", (500, 660), (760, 900)),
        ("text_repet25_2L_s0", (440, 540), (560, 660)),
    ],
)
def test_induction_is_found_where_it_formed(name, onset, midpoint):
    run = recorded(name)

    first, *_ = fit(run["step"].to_numpy(), run["max_ind"].to_numpy())

    assert first.direction == "up"
    assert onset[0] <= first.onset <= onset[1]
    assert midpoint[0] <= first.midpoint <= midpoint[1]
    assert first.validity == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "null_blocks_1L_s0",
        "null_blocks_1L_s1",
        "null_markov_1L_s0",
        "null_text_plain_1L_s0",
        "null_text_repet25_2Lnopos_s0",
        "null_text_rotary",
    ],
)
def test_no_induction_is_found_where_none_formed(name):
    run = recorded(name)

    assert fit(run["step"].to_numpy(), run["max_ind"].to_numpy()) == []


def test_induction_that_forms_over_most_of_a_run_shows_along_the_logarithm():
    run = recorded("text_all_slow")
    step, value = run["step"].to_numpy(), run["max_ind"].to_numpy()

    (found,) = fit(step, value, axis="log_step")

    assert fit(step, value) == []
    assert found.direction == "up"
    assert found.validity == "not ended by the last measurement"
    assert 2000 < found.onset < 3000


def test_grokking_is_one_transition_whatever_its_form():
    run = recorded("grok_p59_mlp_s0")

    (found,) = fit(run["step"].to_numpy(), run["test_acc"].to_numpy())

    assert (found.direction, found.validity) == ("up", "ok")
    assert 500 < found.onset < 600
    assert 680 < found.midpoint < 780
    assert found.height == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("step", "value", "options", "said"),
    [
        ([0, 2, 1], [0, 1, 2], {}, "steps must increase, and after 2 comes 1: sort"),
        ([0, 1, 1], [0, 1, 2], {}, "after 1 comes 1: sort the measurements and keep one of each"),
        ([0, 1], [0, 1, 2], {}, r"steps of shape \(2,\) and values of shape \(3,\) arrived"),
        ([[0, 1]], [[0, 1]], {}, "one series at a time"),
        ([0, np.nan, 2], [0, 1, 2], {}, "1 of 3 steps are not finite: leave"),
        ([-5, 1, 2], [0, 1, 2], {"axis": "log_step"}, "first step is -5, .* use axis='step'"),
        ([0, 1, 2], [0, 1, 2], {"axis": "tokens"}, "axis is 'tokens'; expected 'step' or"),
        ([0, 1, 2], [0, 1, 2], {"resamples": 0}, "resamples is 0; expected 1 or more"),
    ],
)
def test_what_cannot_be_read_is_refused(step, value, options, said):
    with pytest.raises(ValueError, match=said):
        fit(np.array(step), np.array(value), **options)


def test_a_transition_is_a_value():
    (found,) = fit(np.arange(150), noisy())

    assert isinstance(found, Transition)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.onset = 1
    for name in QUANTITIES:
        low, high = interval(found, name)
        assert low < getattr(found, name) < high
