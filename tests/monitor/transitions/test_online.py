"""The detector says when a change begins, in simulated and recorded series, and is quiet without
one; what it said does not depend on what comes later, on units, or on a restart.
"""

import json

import numpy as np
import pytest

from monitor.transitions.online import HELD_FOR, OnlineDetector
from tests.trajectories import NOISES, NULLS, noise, null, recorded, sigmoid

LENGTH = 120


def said(value, step=None, detector=None, **kwargs):
    detector = detector or OnlineDetector()
    for at, number in zip(np.arange(len(value)) if step is None else step, value, strict=True):
        detector.update(float(at), float(number), **kwargs)
    return detector.history


def outline(events):
    return [(event.state, event.direction, event.step, event.onset) for event in events]


def risen(seed=0, height=8.0, kind="white", width=5):
    rng = np.random.default_rng(seed)
    curve = sigmoid(LENGTH, midpoint=70, width=width, height=height)
    return curve + noise(kind, LENGTH, rng)


def test_a_rise_is_provisional_then_confirmed():
    events = said(risen())
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert {event.direction for event in events} == {"up"}
    assert 66 <= events[0].step <= 73
    assert all(62 <= event.onset <= 72 for event in events)
    assert all(event.score >= event.threshold for event in events)


def test_a_fall_is_the_mirror_image_of_a_rise():
    up, down = said(risen()), said(-risen())
    assert outline(down) == [(state, "down", *at) for state, _, *at in outline(up)]


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0.0), (1e9, 0.0), (1.0, 1e4), (1e-3, -7.0)])
def test_units_do_not_matter(scale, offset):
    assert outline(said(risen() * scale + offset)) == outline(said(risen()))


def test_units_of_steps_do_not_matter():
    at = 500.0 * np.arange(LENGTH)
    expected = [(*words, 500 * step, 500 * onset) for *words, step, onset in outline(said(risen()))]
    assert outline(said(risen(), step=at)) == expected


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300, -3e-300])
def test_a_constant_says_nothing(value):
    assert said(np.full(40, value)) == ()


@pytest.mark.parametrize("value", [0.1, 1e6])
def test_the_last_digits_say_nothing(value):
    series = np.full(60, value)
    series[30:] = np.nextafter(value, np.inf)
    assert said(series) == ()


@pytest.mark.parametrize("height", [20.0, -1000.0])
def test_a_lone_spike_says_nothing(height):
    values = np.random.default_rng(0).standard_normal((100, 100))
    values[80] += height
    # One in 200 has been on the way up by chance.
    assert sum(map(bool, together(values))) <= 3


def test_a_spike_after_a_constant_says_nothing():
    value = np.zeros(60)
    value[30] = 1.0
    assert said(value) == ()


def test_what_goes_back_is_retracted():
    value = risen(seed=0, height=0)
    value[70:73] += 12
    states = [event.state for event in said(value)]
    assert states == ["provisional", "retracted"]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_known_beforehand(seed):
    value = risen(seed)
    whole = said(value)
    for end in (68, 71, 73, 90):
        assert said(value[:end]) == tuple(event for event in whole if event.step < end)


def test_what_is_missing_is_skipped():
    value = risen()
    gaps = np.repeat(np.nan, 2 * LENGTH)
    gaps[::2] = value
    detector = OnlineDetector()
    assert outline(said(gaps, step=np.arange(2 * LENGTH) / 2, detector=detector)) == outline(
        said(value)
    )
    assert detector.update(1000, {"new": 1.0}) == []


def test_irregular_steps():
    rng = np.random.default_rng(4)
    at = np.cumsum(rng.integers(1, 20, LENGTH)).astype(float)
    # A line along the steps, with which the measurements come ever denser.
    assert said(0.3 * at + noise("white", LENGTH, rng), step=at) == ()
    denser = np.concatenate([np.arange(60) * 100.0, 6000 + np.arange(60) * 10.0])
    assert said(denser / 50 + noise("white", LENGTH, rng), step=denser) == ()
    events = said(risen(4), step=at)
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert at[66] <= events[0].step <= at[73]


def test_series_are_told_apart_and_share_the_rate():
    detector, alone = OnlineDetector(), OnlineDetector()
    quiet = noise("white", LENGTH, np.random.default_rng(9))
    for at, (rises, stays) in enumerate(zip(risen(height=12), quiet, strict=True)):
        got = detector.update(at, {"1.2": rises, **{f"0.{head}": stays for head in range(9)}})
        assert all(event.series == "1.2" for event in got)
        alone.update(at, rises)
    assert [event.state for event in detector.history] == ["provisional", "confirmed"]
    assert detector.history[0].threshold > alone.history[0].threshold


def test_with_their_standard_error_small_values_say_nothing():
    value = np.concatenate([np.zeros(30), 0.01 * np.arange(20)])
    assert said(value) != ()
    assert said(value, stderr=0.3) == ()


def test_what_is_lower_than_matters_is_not_said():
    value = risen(height=12)
    assert [event.state for event in said(value, least=6.0)] == ["provisional", "confirmed"]
    assert said(value, least=30.0) == ()
    # What is not known hides nothing.
    assert said(value, least=float("nan")) == said(value)


def test_a_break_of_the_chain_forgets():
    value = risen(height=30, width=1)
    detector = OnlineDetector()
    for at in range(70):
        detector.update(at, value[at])
    detector.break_chain(70)
    for at in range(70, LENGTH):
        assert detector.update(at, value[at]) == []


def test_a_break_of_the_chain_retracts_what_was_provisional():
    detector = OnlineDetector()
    value = risen(height=30, width=1)
    for at in range(LENGTH):
        if detector.update(at, value[at]):
            break
    detector.break_chain(at + 0.5)
    assert [event.state for event in detector.history] == ["provisional", "retracted"]
    assert detector.history[-1].step == at + 0.5


@pytest.mark.parametrize("until", [10, 69, 71, 73, 100])
def test_a_run_that_resumes_goes_on(until):
    value, detector, resumed = risen(), OnlineDetector(), OnlineDetector()
    for at in range(until):
        detector.update(at, {"a": value[at], "b": -value[at]})
    kept = json.dumps(detector.state(), allow_nan=False)
    resumed.restore(json.loads(kept))
    for at in range(until, LENGTH):
        both = {"a": value[at], "b": -value[at]}
        assert resumed.update(at, both) == detector.update(at, both)
    assert resumed.history == detector.history != ()
    assert json.loads(kept) != resumed.state()


def test_a_state_does_not_change_later():
    detector = OnlineDetector()
    detector.update(0, 1.0)
    state = detector.state()
    resumed = OnlineDetector()
    resumed.restore(state)
    resumed.update(1, 2.0)
    assert state == detector.state()


@pytest.mark.parametrize("rate", [0, -1, np.inf, np.nan])
def test_a_rate_is_above_0(rate):
    with pytest.raises(ValueError, match="expected a number above 0"):
        OnlineDetector(rate)


@pytest.mark.parametrize("step", [3, 2, np.nan, np.inf])
def test_steps_increase(step):
    detector = OnlineDetector()
    detector.update(3, 0.0)
    with pytest.raises(ValueError, match="after step 3"):
        detector.update(step, 0.0)


def test_what_is_refused_leaves_no_trace():
    detector = OnlineDetector()
    detector.update(0, {"a": 0.0, "b": 0.0})
    before = detector.state()
    with pytest.raises(ValueError, match="series 'b' is inf"):
        detector.update(1, {"a": 0.0, "b": np.inf})
    with pytest.raises(ValueError, match="standard error of series 'a'"):
        detector.update(1, {"a": 0.0}, stderr=-1.0)
    with pytest.raises(ValueError, match="least height of series 'a' is inf"):
        detector.update(1, {"a": 0.0}, least={"a": np.inf})
    with pytest.raises(ValueError, match="the chain is broken at step -1"):
        detector.break_chain(-1)
    assert detector.state() == before


def test_a_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="give what state"):
        OnlineDetector().restore({"last": 3})
    with pytest.raises(ValueError, match="build it with the same rate"):
        OnlineDetector(2.0).restore(OnlineDetector(1.0).state())


def together(values):
    """What is said of each series, one a column, with a rate of 1 per 1,000 for each."""
    detector = OnlineDetector(values.shape[1])
    for at, row in enumerate(values):
        detector.update(at, {str(which): number for which, number in enumerate(row)})
    of = {str(which): [] for which in range(values.shape[1])}
    for event in detector.history:
        of[event.series].append(event)
    return list(of.values())


def test_many_series_are_weighed_as_one_is():
    rng = np.random.default_rng(5)
    values = np.column_stack([risen(seed, height=rng.uniform(0, 12)) for seed in range(6)])
    values[40:44, 2] = np.nan
    for value, events in zip(values.T, together(values), strict=True):
        alone = said(value)
        assert outline(alone) == outline(events)
        assert [e.score for e in alone] == pytest.approx([e.score for e in events])


@pytest.mark.parametrize("of", [*NOISES, "walk", "small", "growing", "drift"])
def test_false_alarms_are_as_rare_as_stated(of):
    rng = np.random.default_rng(11)

    def drawn(kind):
        white = rng.standard_normal(200)
        other = {
            "walk": np.cumsum(white),
            "small": white / 1000,
            "growing": white * np.linspace(0.1, 1, 200),
            "drift": noise("white", 200, rng) + np.cumsum(white) / 4,
        }
        return null(kind, 200, rng) + (other[of] if of in other else noise(of, 200, rng))

    events = together(np.column_stack([drawn(kind) for kind in NULLS for _ in range(10)]))
    # 12,000 measurements: 12 alarms are expected at most, 20 come by chance in 1 of 80 tests.
    assert sum(event.state == "provisional" for each in events for event in each) < 20


@pytest.mark.parametrize(("of", "width"), [("white", 1), ("white", 9), ("heavy", 9), ("ar0.9", 1)])
def test_transitions_of_five_deviations_are_found_soon(of, width):
    rng = np.random.default_rng(3)
    curve = sigmoid(160, midpoint=110, width=width, height=5)
    values = np.column_stack([curve + noise(of, 160, rng) for _ in range(40)])
    found = [
        [event.step - 110 for event in events if event.state == "provisional" and event.step > 100]
        for events in together(values)
    ]
    first = [each[0] for each in found if each]
    # Where 95% are found, fewer than 35 of 40 are in 1 of 70 tests.
    assert len(first) >= 35
    assert np.median(first) <= 3


def test_a_constant_that_moves_is_found_at_once():
    for curve in (np.ones(10), np.linspace(0.1, 1, 10)):
        value = np.concatenate([np.zeros(30), curve, np.ones(20)])
        events = said(value)
        assert [event.state for event in events[:2]] == ["provisional", "confirmed"]
        assert events[0].direction == "up"
        assert 31 <= events[0].step <= 33


def test_a_score_that_saturates_rises_once():
    value = np.clip(sigmoid(LENGTH, midpoint=60, width=8, height=1.02) - 0.01, 0, 1)
    events = said(value)
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert events[0].step <= 60


def test_several_transitions_of_one_series():
    rng = np.random.default_rng(1)
    value = rng.standard_normal(220)
    value += sigmoid(220, midpoint=60, width=2, height=12)
    value -= sigmoid(220, midpoint=110, width=2, height=20)
    value += sigmoid(220, midpoint=170, width=2, height=12)
    confirmed = [event for event in said(value) if event.state == "confirmed"]
    assert [event.direction for event in confirmed] == ["up", "down", "up"]
    assert [round(event.onset, -1) for event in confirmed] == [60, 110, 170]


def test_one_near_the_start_is_found_when_enough_is_known():
    events = said(np.concatenate([np.zeros(8), np.full(20, 8.0)]) + risen(height=0)[:28])
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert 9 <= events[0].step <= 12


def test_steps_that_double_and_then_go_on_evenly():
    step = np.concatenate([[0], 2.0 ** np.arange(10), np.arange(1, 80) * 1000.0])
    rng = np.random.default_rng(8)
    quiet = [0 * step, step / 2000, 3 * np.log1p(step), -8 * np.exp(-step / 3000)]
    for curve in quiet:
        assert said(curve + rng.standard_normal(len(step)), step=step) == ()
    rises = 10.0 * (step > 40_500) + rng.standard_normal(len(step))
    events = said(rises, step=step)
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert 41_000 <= events[0].step <= 43_000


RISES = [
    ("blocks_2L_s0", "max_ind"),
    ("blocks_2L_s1", "max_ind"),
    ("markov_2L_s0", "max_ind"),
    ("text_plain_2L_s0", "max_ind"),
    ("text_repet25_2L_s0", "max_ind"),
    ("grok_p59_mlp_s0", "test_acc"),
    ("text_all_slow", "max_ind"),
    ("text_plain_2L_s0", "max_prev"),
    ("text_repet25_2L_s0", "max_prev"),
]


@pytest.mark.parametrize(("run", "column"), RISES)
def test_recorded_transitions(run, column):
    frame = recorded(run)
    value = frame[column].to_numpy()
    half = int(np.argmax(value > value[0] + 0.5 * np.ptp(value)))
    events = said(value, step=frame["step"])
    first = {event.state: event for event in reversed(events)}
    assert first["provisional"].direction == first["confirmed"].direction == "up"
    assert first["provisional"].step <= frame["step"][half + 3]
    assert first["confirmed"].step <= frame["step"][half + 3 + HELD_FOR]


@pytest.mark.parametrize(
    "run",
    [
        "null_blocks_1L_s0",
        "null_blocks_1L_s1",
        "null_markov_1L_s0",
        "null_text_plain_1L_s0",
        "null_text_repet25_2Lnopos_s0",
        "null_text_rotary",
    ],
)
def test_recorded_nulls(run):
    frame = recorded(run)
    assert said(frame["max_ind"].to_numpy(), step=frame["step"]) == ()
