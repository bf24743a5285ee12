"""Transitions fitted to recorded runs: where they are, how far apart, on every axis, and what those
that led in other runs say of one that is going on.
"""

import dataclasses

import numpy as np
import pytest

import monitor
from monitor.across.fitted import NONE
from monitor.detection import SERIES, Series
from monitor.probes import parameters
from monitor.record import Measurement, Reading
from monitor.sinks import ParquetSink
from tests.monitor.across.recorded import SCORES, record_scores
from tests.monitor.detection.made_up import weights
from tests.monitor.sinks.fabricated import moment

FIRST = Series.best("first", "scores", "score", where="layer = 0")
SECOND = Series.best("second", "scores", "score", where="layer = 1")


def sigmoid(at, *, measurements=60, height=1.0, seed=0):
    number = np.arange(measurements)
    noise = 0.03 * np.random.default_rng(seed).normal(size=measurements)
    return (height / (1 + np.exp(-1.5 * (number - at))) + noise).tolist()


def record(root, run, first, second, **more):
    record_scores(root, run, {(0, 0): first, (1, 0): second}, **more)


def record_weights(root, at, *, last_until=0, fields=("norm", "digest", "sketch")):
    """Of run r, weights that move on evenly around these places; those of the last measurement
    take the place of all until one.
    """
    sink, spec = ParquetSink(root, "r"), parameters.SPEC.only(list(fields))
    for number in range(len(at)):
        shown = len(at) - 1 if number < last_until else number
        table = weights(moment(10 * number), f"{shown}", [at[shown] + 0.001 * shown, 1.0]).table
        columns = {name: table[name].to_pylist() for name in table.column_names}
        when = moment(10 * number)
        made = Reading.build(spec, when, columns)
        sink.write(Measurement(moment=when, readings=(made,)))


def fits(root, runs=None, **more):
    return monitor.fitted(root, runs, [FIRST, SECOND], **more)


def test_of_our_own_series_those_are_there_whose_fields_were_measured(tmp_path):
    record_scores(
        tmp_path,
        "r",
        {(0, 0): sigmoid(30)},
        spec=dataclasses.replace(SCORES, name="induction"),
    )
    found = monitor.fitted(tmp_path, series=[*SERIES, Series.best("mine", "induction", "score")])
    assert found["series"].tolist() == ["mine"]
    with pytest.raises(ValueError, match=r"series 'wrong'.*its query failed"):
        monitor.fitted(tmp_path, series=[Series.best("wrong", "induction", "nothing")])


def test_what_is_lower_than_two_standard_errors_is_no_transition(tmp_path):
    for run, stderr in (("known", 0.1), ("vague", 0.6)):
        record_scores(tmp_path, run, {(0, 0): sigmoid(30)}, stderr=stderr)
    found = monitor.fitted(tmp_path, series=[FIRST])
    assert dict(zip(found["run"], found["validity"], strict=True)) == {
        "known": "ok",
        "vague": NONE,
    }


def test_transitions_of_a_run_and_the_series_without_any(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(30, height=0.0, seed=1))
    first, second = fits(tmp_path).to_dict("records")
    assert (first["run"], first["series"], first["direction"]) == ("r", "first", "up")
    assert first["midpoint"] == pytest.approx(300, abs=5)
    assert first["midpoint_low"] < first["midpoint"] < first["midpoint_high"]
    assert (first["validity"], second["validity"]) == ("ok", NONE)
    assert first["searched"] == second["searched"] == 2
    assert first["last"] == second["last"] == 590


def test_in_tokens_and_along_the_logarithm(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(40, seed=1), tokens_a_step=1_000)
    by_step, by_tokens, by_log = (
        fits(tmp_path, axis=axis).set_index("series")["midpoint"]
        for axis in ("step", "tokens", "log_step")
    )
    assert by_tokens["first"] == pytest.approx(1_000 * by_step["first"], rel=1e-6)
    assert by_log["first"] == pytest.approx(by_step["first"], rel=0.05)


def test_tokens_that_were_not_counted(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(40), tokens_a_step=None)
    found = fits(tmp_path, axis="tokens")
    assert found["validity"].tolist() == ["tokens were not counted"] * 2
    assert found["direction"].isna().all()


def test_no_transition_across_a_break(tmp_path):
    """A step that falls on it is none."""
    first = [0.0] * 30 + [1.0] * 30
    noise = 0.03 * np.random.default_rng(0).normal(size=60)
    record(tmp_path, "r", (first + noise).tolist(), sigmoid(15, seed=1))
    assert fits(tmp_path)["direction"].tolist() == ["up", "up"]
    record_weights(tmp_path, [-3.0 if number >= 30 else 1.0 for number in range(60)])
    found = fits(tmp_path).set_index("series")
    assert found.loc["first", "validity"] == NONE
    assert found.loc["second", "midpoint"] == pytest.approx(150, abs=5)


def test_no_transition_where_early_checkpoints_held_the_last_weights(tmp_path):
    """All of them are near each other: that the last ones come twice is what tells."""
    noise = 0.03 * np.random.default_rng(0).normal(size=60)
    record(tmp_path, "r", ([1.0] * 30 + [0.0] * 30 + noise).tolist(), sigmoid(45, seed=1))
    assert fits(tmp_path).loc[0, "midpoint"] == pytest.approx(295, abs=5)
    record_weights(tmp_path, [1.0] * 60, last_until=30)
    found = fits(tmp_path).set_index("series")
    assert found.loc["first", "validity"] == NONE
    assert found.loc["second", "midpoint"] == pytest.approx(450, abs=5)


def test_an_unbroken_chain_hides_nothing(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(15, seed=1))
    before = fits(tmp_path)
    record_weights(tmp_path, [1.0] * 60)
    assert fits(tmp_path).equals(before)


def test_weights_of_which_only_the_norm_was_measured(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(15, seed=1))
    before = fits(tmp_path)
    record_weights(tmp_path, [1.0] * 60, fields=["norm"])
    assert fits(tmp_path).equals(before)


def test_how_far_apart(tmp_path):
    record(tmp_path, "r", sigmoid(25), sigmoid(40, seed=1))
    (lead,) = monitor.apart(fits(tmp_path)).to_dict("records")
    assert (lead["run"], lead["first"], lead["then"]) == ("r", "first up", "second up")
    assert lead["lead"] == pytest.approx(150, abs=10)
    assert lead["lead_low"] < 150 < lead["lead_high"]
    assert lead["sure"]


def test_what_falls_together_has_no_order(tmp_path):
    record(tmp_path, "r", sigmoid(30), sigmoid(30, seed=1))
    (lead,) = monitor.apart(fits(tmp_path)).to_dict("records")
    assert not lead["sure"]
    assert lead["lead_low"] < 0 < lead["lead_high"]


def test_intervals_of_leads_cover(tmp_path):
    """Of the true lead, in noise: 95%, give or take."""
    held = []
    for seed in range(8):
        root = tmp_path / str(seed)
        record(root, "r", sigmoid(25, seed=2 * seed), sigmoid(40, seed=2 * seed + 1))
        (lead,) = monitor.apart(fits(root)).to_dict("records")
        held.append(lead["lead_low"] <= 150 <= lead["lead_high"])
    assert sum(held) >= 6


def test_what_led_in_other_runs_warns(tmp_path):
    for run, second in (("a", 40), ("b", 50), ("c", 30)):
        record(tmp_path, run, sigmoid(25), sigmoid(second, seed=1))
    # Here only the first has moved.
    record(tmp_path, "now", sigmoid(20), sigmoid(20, height=0.0, seed=1))
    record(tmp_path, "never", sigmoid(25), sigmoid(20, height=0.0, seed=1))
    found = fits(tmp_path)
    (warning,) = monitor.early_warnings(found, "now").to_dict("records")
    assert (warning["moved"], warning["outcome"]) == ("first up", "second up")
    assert (warning["followed"], warning["runs"]) == (3, 4)
    assert warning["share_low"] < 0.75 < warning["share_high"]
    assert warning["least"] == pytest.approx(50, abs=10)
    assert warning["median"] == pytest.approx(150, abs=10)
    assert warning["most"] == pytest.approx(250, abs=10)
    assert warning["expected"] == pytest.approx(350, abs=15)
    # What has happened needs no warning.
    assert monitor.early_warnings(found, "a").empty


def test_without_other_runs_nothing_is_known(tmp_path):
    record(tmp_path, "r", sigmoid(25), sigmoid(40, height=0.0))
    assert monitor.early_warnings(fits(tmp_path), "r").empty


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"runs": "r"}, TypeError, r"runs is 'r': expected a list of names"),
        ({"runs": ["x"]}, ValueError, "unknown run in .*'x'; known: r"),
        ({"axis": "time"}, ValueError, "unknown axis: 'time'"),
    ],
)
def test_arguments_of_no_use(tmp_path, arguments, error, said):
    record(tmp_path, "r", sigmoid(25), sigmoid(40))
    with pytest.raises(error, match=said):
        fits(tmp_path, **arguments)
    with pytest.raises(ValueError, match="unknown run"):
        monitor.early_warnings(fits(tmp_path), "x")
