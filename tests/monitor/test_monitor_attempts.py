"""A run that goes on: attempts, the stimuli that stay the same, and what is set aside."""

import logging

import monitor
from tests.callbacks.tiny import text
from tests.recorded import said


def test_a_restart_is_an_attempt_and_sets_later_steps_aside(tmp_path, model, start, caplog):
    first = start(tmp_path)
    for step in range(0, 60, 10):
        first.measure(model, step=step, tokens=step)
    first.close()
    second = start(tmp_path, resumed_from=25)
    for step in range(30, 80, 10):
        second.measure(model, step=step, tokens=step)
    assert second.attempt == 2
    frame = monitor.read(tmp_path, "in_context")
    assert frame["step"].tolist() == [0, 10, 20, 30, 40, 50, 60, 70]
    assert frame["attempt"].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    attempts = monitor.read(tmp_path, "attempts")
    assert attempts["attempt"].tolist() == [1, 2]
    assert attempts["resumed_from"].fillna(-1).tolist() == [-1, 25]
    assert attempts["started"].is_monotonic_increasing
    aside = sorted(p.name for p in (tmp_path / "_superseded/in_context/run=r").iterdir())
    assert aside == [f"{step:012d}.1.parquet" for step in (30, 40, 50)]
    assert any("6 files of earlier attempts" in line for line in said(caplog))


def test_without_resumed_from_it_goes_on_just_before_the_first_measurement(tmp_path, model, start):
    first = start(tmp_path)
    for step in range(4):
        first.measure(model, step=step)
    second = start(tmp_path)
    second.measure(model, step=2)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["step", "attempt"]].values.tolist() == [[0, 1], [1, 1], [2, 2]]


def test_starting_over_under_the_same_name_sets_everything_aside(tmp_path, model, start):
    start(tmp_path, seed=0).measure(model, step=0)
    start(tmp_path, seed=1).measure(model, step=0)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["step", "attempt"]].values.tolist() == [[0, 2]]
    # With its own stimuli, and the earlier ones are kept too.
    stimuli = monitor.read(tmp_path, "stimuli")["stimulus"].value_counts()
    assert stimuli.to_dict() == {"repeated": 4, "text": 4, "text_tail": 4, "concepts": 7}
    assert len(list((tmp_path / "_superseded/stimuli/run=r").iterdir())) == 1


def test_the_stimuli_stay_whatever_is_passed_later(tmp_path, model, start, caplog):
    caplog.set_level(logging.INFO, logger="phasewatch")
    first = start(tmp_path, seed=0)
    before = first.measure(model, step=0)
    stored = monitor.read(tmp_path, "stimuli")
    second = start(tmp_path, seed=9, text=text(seed=7), sequences=6, context=16, resumed_from=0)
    after = second.measure(model, step=1)
    now = monitor.read(tmp_path, "stimuli")
    assert now["token_ids"].map(list).tolist() == stored["token_ids"].map(list).tolist()
    assert now["period"].tolist() == stored["period"].tolist()
    # The model is the same, and so are the numbers, to the last bit.
    for table in ("induction", "in_context"):
        columns = before.frame(table).columns.drop(["step", "time", "attempt"])
        assert after.frame(table)[columns].to_json() == before.frame(table)[columns].to_json()
    assert any("goes on with the stimuli stored" in line for line in said(caplog))


def test_other_runs_are_left_alone(tmp_path, model, start):
    start(tmp_path, run="a").measure(model, step=5)
    start(tmp_path, run="b").measure(model, step=0)
    start(tmp_path, run="b").measure(model, step=0)
    frame = monitor.read(tmp_path, "in_context")
    assert frame[["run", "step", "attempt"]].values.tolist() == [["a", 5, 1], ["b", 0, 2]]


def test_preparing_twice_is_one_attempt(tmp_path, model, start):
    one = start(tmp_path)
    one.prepare(model, 0)
    one.prepare(model, 0)
    one.measure(model, step=0)
    assert len(monitor.read(tmp_path, "attempts")) == 1
