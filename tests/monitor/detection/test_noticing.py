"""Noticing: a planted rise is said to begin, and confirmed with where it was; a run that is taken
up again goes on as if it had never stopped; and what fails takes nothing else with it.
"""

import dataclasses
import os
import signal
import threading

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from monitor.detection import SERIES, Noticing, Series, reading
from monitor.transitions import OnlineDetector
from tests.monitor.detection.made_up import NUMBER, measured, rising, weights


def noticed(noticing, measurements):
    return [notice for one in measurements for notice in noticing.notice(one).notices]


def test_a_rise_is_provisional_and_then_confirmed():
    noticing = Noticing([NUMBER])
    begun, held = noticed(noticing, rising())
    assert (begun.event.state, held.event.state) == ("provisional", "confirmed")
    assert begun.event.direction == "up"
    assert 380 <= begun.event.step <= 430
    assert begun.fitted is None
    assert held.detected_at == begun.event.step < held.event.step <= begun.event.step + 60
    assert held.fitted.midpoint == pytest.approx(400, abs=10)
    assert held.fitted.onset_low < held.fitted.onset < held.fitted.end < held.fitted.end_high
    assert held.fitted.height == pytest.approx(1, abs=0.1)
    assert held.n == held.event.step / 10 + 1
    assert "number up since step" in str(held)


def test_what_is_pending():
    noticing, pending = Noticing([NUMBER]), []
    for one in rising():
        noticing.notice(one)
        pending.append(noticing.pending)
    said = [bool(one) for one in pending]
    first, last = said.index(True), len(said) - said[::-1].index(True)
    assert all(said[first:last])
    assert pending[first] == pending[last - 1] == {"number": 10 * first}
    assert not pending[-1]


def test_noise_is_no_transition():
    assert noticed(Noticing([NUMBER]), rising(height=0.0, measurements=100)) == []


def test_a_change_that_other_sequences_might_not_show_is_none():
    assert noticed(Noticing([NUMBER]), rising(stderr=0.4)) != []
    assert noticed(Noticing([NUMBER]), rising(stderr=0.6)) == []
    assert noticed(Noticing([NUMBER]), rising(stderr=float("nan"))) != []


def test_the_rows_are_what_was_said():
    noticing = Noticing([NUMBER], false_alarms=2.0)
    for one in rising():
        found = noticing.notice(one)
        if not found.notices:
            continue
        (notice,) = found.notices
        (row,) = reading(found.notices, one.moment).table.to_pylist()
        assert row["step"] == notice.event.step == one.moment.step
        assert (row["series"], row["state"]) == ("number", notice.event.state)
        assert (row["searched"], row["false_alarms"]) == (1, 2.0)
        assert row["score"] > row["score_null"] > 0
        assert row["provisional"] + row["confirmed"] == 1
        assert row["validity"] == "ok"
        confirmed = notice.event.state == "confirmed"
        assert (row["midpoint"] is None) != confirmed
        if confirmed:
            assert row["midpoint_low"] < row["midpoint"] < row["midpoint_high"]


@pytest.mark.parametrize("stopped", [35, 41, 42, 50])
def test_a_run_that_is_taken_up_again_goes_on(stopped):
    """Before, while and after a transition is provisional."""
    whole = rising()
    expected = [str(notice) for notice in noticed(Noticing([NUMBER]), whole)]
    before = Noticing([NUMBER])
    said = [str(notice) for notice in noticed(before, whole[:stopped])]
    connection = duckdb.connect()
    tables = [one.readings[0].table for one in whole[: stopped + 3]]
    connection.register("made_up", pa.concat_tables(tables))
    after = Noticing([NUMBER])
    # What was measured beyond the checkpoint is measured again.
    after.replay(connection, until=whole[stopped - 1].moment.step)
    assert after.pending == before.pending
    said += [str(notice) for notice in noticed(after, whole[stopped:])]
    assert said == expected


def test_a_query_that_fails_is_told_of_and_the_others_go_on():
    wrong = Series(name="wrong", query="select step, nothing as value from made_up")
    noticing, failures, notices = Noticing([wrong, NUMBER]), [], []
    for one in rising():
        found = noticing.notice(one)
        failures += found.failures
        notices += found.notices
    assert [failure.part for failure in failures] == ["series wrong"] * 60
    assert [notice.event.series for notice in notices] == ["number"] * 2


def test_of_our_own_series_those_are_followed_that_are_measured():
    """Fields that were not asked for, and tables that are not there, are no failure."""
    found = Noticing([*SERIES, NUMBER]).notice(measured(0, 0.0))
    assert (found.notices, found.failures) == ((), ())
    one = measured(1, 0.0)
    (made_up,) = one.readings
    bare = dataclasses.replace(made_up, spec=dataclasses.replace(made_up.spec, name="induction"))
    found = Noticing().notice(dataclasses.replace(one, readings=(bare,)))
    assert found.failures == ()


def test_two_series_of_one_name():
    with pytest.raises(ValueError, match="'induction head' are there more than once"):
        Noticing([*SERIES, Series(name="induction head", query="select 1")])


def with_weights(measurements, digests, sketches):
    """The measurements with the table that says which weights were measured."""
    for one, digest, sketch in zip(measurements, digests, sketches, strict=True):
        yield dataclasses.replace(
            one, readings=(*one.readings, weights(one.moment, digest, sketch))
        )


def chain(broken_at=None):
    """Weights that move on evenly, and from some measurement on are from elsewhere."""
    digests = [f"{number}" for number in range(60)]
    sketches = [[1.0 + 0.01 * number, 1.0] for number in range(60)]
    if broken_at is not None:
        sketches[broken_at:] = [[-5.0 - 0.01 * number, 3.0] for number in range(60 - broken_at)]
    return digests, sketches


def test_no_change_is_claimed_across_a_break():
    """The same rise as above, at the very measurement at which the weights are others."""
    found = noticed(Noticing([NUMBER]), with_weights(rising(), *chain(broken_at=39)))
    (broken,) = found
    assert (broken.kind, broken.event.series) == ("break", "chain of checkpoints")
    assert broken.event.step == 390
    assert str(broken) == (
        "chain of checkpoints broken at step 390: its weights are far from those of step 380"
    )
    (row,) = reading(found, rising()[39].moment).table.to_pylist()
    assert (row["kind"], row["label"]) == ("break", "its weights are far from those of step 380")


def test_a_break_that_is_known_late_says_where_it_was():
    """The last weights of the run were served at its first measurements."""
    digests, sketches = chain()
    digests[:20], sketches[:20] = [digests[59]] * 20, [sketches[59]] * 20
    found = noticed(Noticing([NUMBER]), with_weights(rising(height=0.0), digests, sketches))
    (broken,) = found
    assert (broken.event.step, broken.event.onset) == (590, 200)
    assert broken.label == "the weights of step 190 were those of step 590"
    assert str(broken) == f"chain of checkpoints broken at step 200: {broken.label}"
    (row,) = reading(found, measured(590, 0.0).moment).table.to_pylist()
    assert (row["step"], row["began"]) == (590, 200)


def test_along_an_unbroken_chain_it_is():
    found = noticed(Noticing([NUMBER]), with_weights(rising(), *chain()))
    assert [notice.event.state for notice in found] == ["provisional", "confirmed"]


def test_what_was_provisional_is_retracted_where_the_chain_breaks():
    begun, _ = noticed(Noticing([NUMBER]), rising())
    at = int(begun.event.step) // 10 + 1
    found = noticed(Noticing([NUMBER]), with_weights(rising(), *chain(broken_at=at)))
    assert [(one.kind, one.event.state) for one in found][:3] == [
        ("change", "provisional"),
        ("break", "confirmed"),
        ("change", "retracted"),
    ]
    assert found[2].label == found[1].label


def test_a_step_that_is_measured_again_says_nothing_more():
    whole = rising()
    noticing = Noticing([NUMBER])
    found = noticed(noticing, [one for each in whole for one in (each, each)])
    assert [str(one) for one in found] == [str(one) for one in noticed(Noticing([NUMBER]), whole)]


def test_a_loss_that_falls_and_follows_its_schedule_does_not_change():
    """A power law with noise, and one whose learning rate decays over the last fifth."""
    step, said = np.arange(125), {}
    for decays in (False, True):
        detector, random = OnlineDetector(1.0), np.random.default_rng(0)
        fallen = 0.15 * np.clip((step - 100) / 25, 0, None) * decays
        losses = [
            2 + 7 * (1 + 100 * step / start) ** -0.4 - fallen + 0.003 * random.normal(size=125)
            for start in np.linspace(50, 300, 8)
        ]
        for at, values in enumerate(np.transpose(losses).tolist()):
            detector.update(at, {str(run): value for run, value in enumerate(values)})
        said[decays] = {event.series for event in detector.history}
    assert len(said[False]) <= 1
    assert len(said[True]) <= 1


def test_control_c_during_a_query_breaks_off():
    """DuckDB makes an error of it, and errors never stop a training."""
    endless = Series(
        name="endless",
        query="select 0 as step, count(*) as value from range(1000000) a, range(1000000) b "
        "where (a.range * b.range) % 7 = 3",
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    pressed = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    pressed.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            Noticing([endless]).notice(next(iter(rising())))
    finally:
        pressed.join()
        signal.signal(signal.SIGINT, before)
