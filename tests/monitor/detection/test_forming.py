"""What has formed is said once: where a head has had it for a usual interval between measurements.
What comes and goes near the threshold is seldom said to have formed, and what forms, soon.
"""

import dataclasses

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from monitor.detection import Noticing, reading
from monitor.detection.events import Claim, Passing, Seen
from monitor.detection.forming import Forming
from monitor.record import Measurement
from tests.monitor.sinks.fabricated import heads, moment

SCORED = Passing(name="scored", table="heads", field="score", null=0.25)
CLAIMED = Claim(name="claimed", table="claims", says="circuit")


def scores(*values):
    """A table of heads, one a score."""
    rows = [
        {
            "step": 0,
            "layer": 0,
            "head": head,
            "score": value,
            "score_stderr": 0.01,
            "score_null": 0.25,
            "n": 16,
            "validity": "ok",
        }
        for head, value in enumerate(values)
    ]
    return {"heads": pd.DataFrame(rows)}


def said(*measurements, interval=0, every=10):
    forming = Forming([SCORED])
    return [
        (event.state, event.step, event.onset)
        for number, values in enumerate(measurements)
        for event in forming.take(every * number, scores(*values), interval=interval)
    ]


def test_twice_in_a_row_and_then_no_more():
    found = said((0.25, 0.25), (0.25, 0.4), (0.25, 0.5), (0.5, 0.9), (0.25, 0.25), (0.9, 0.9))
    assert found == [("provisional", 10, 10), ("confirmed", 20, 10)]


def test_what_does_not_last_is_retracted_and_may_begin_anew():
    found = said((0.4, 0.25), (0.25, 0.25), (0.4, 0.25), (0.4, 0.25))
    assert found == [
        ("provisional", 0, 0),
        ("retracted", 10, 0),
        ("provisional", 20, 20),
        ("confirmed", 30, 20),
    ]


def test_it_must_be_there_for_a_usual_interval():
    """Measured every 10 steps while it is provisional, and every 40 before that."""
    values = [(0.25,), (0.4,), (0.4,), (0.4,), (0.4,), (0.4,), (0.4,)]
    found = said(*values, interval=40)
    assert found == [("provisional", 10, 10), ("confirmed", 50, 10)]


def test_what_falls_a_little_is_not_retracted_and_not_confirmed_there():
    """A tenth of the way is 0.325, and two thirds of that 0.3."""
    low = [(0.25,), (0.33,), (0.31,), (0.33,), (0.31,), (0.31,), (0.33,)]
    assert said(*low, interval=40) == [("provisional", 10, 10), ("confirmed", 60, 10)]
    lost = [(0.25,), (0.33,), (0.31,), (0.29,), (0.33,)]
    assert said(*lost, interval=40) == [
        ("provisional", 10, 10),
        ("retracted", 30, 10),
        ("provisional", 40, 40),
    ]


def test_of_several_heads_one_must_be_there_all_along():
    values = [(0.4, 0.25), (0.4, 0.4), (0.25, 0.4), (0.25, 0.4)]
    assert [state for state, _, _ in said(*values, interval=30)] == [
        "provisional",
        "retracted",
        "provisional",
    ]


@dataclasses.dataclass(frozen=True)
class Premade:
    """What was seen at all steps, of which a table names one."""

    seen: Seen
    name: str = "scored"
    table: str = "heads"
    field: str = "score"

    def see(self, frame):
        (step,) = frame["step"]
        at = slice(step // 10, step // 10 + 1)
        return Seen(**{f.name: getattr(self.seen, f.name)[at] for f in dataclasses.fields(Seen)})


def watched(deviations, seed, *, kept=0.0):
    """What is said in 50 intervals of 40 steps of a number so many standard errors beyond its null,
    with noise of one standard error of which `kept` is left after 10 steps; it is measured every 10
    while something is provisional. Beside that, whether two measurements in a row had it.
    """
    random, steps = np.random.default_rng(seed), np.arange(0, 2_000, 10)
    noise = random.standard_normal(len(steps))
    for at in range(1, len(steps)):
        noise[at] = kept * noise[at - 1] + (1 - kept**2) ** 0.5 * noise[at]
    # A standard error is a twentieth of the way.
    table = scores(*0.25 + 0.0375 * (deviations + noise))["heads"]
    seen = SCORED.see(table.assign(score_stderr=0.0375, step=steps, head=0))
    forming, said, next_one, twice, before = Forming([Premade(seen)]), [], 0, False, False
    for step in steps.tolist():
        if step < next_one:
            continue
        events = forming.take(step, {"heads": pd.DataFrame({"step": [step]})}, interval=40)
        said += [(event.state, event.step, event.onset) for event in events]
        pending = bool(said) and said[-1][0] == "provisional"
        next_one = step + 10 if pending else 40 * (step // 40 + 1)
        held = seen.held[step // 10, 0]
        before, twice = held, twice or (before and held)
    return said, twice


@pytest.mark.parametrize(
    ("deviations", "kept", "at_most"),
    [(0.0, 0.0, 0.0), (1.0, 0.6, 0.05), (2.0, 0.0, 0.12)],
)
def test_what_comes_and_goes_is_seldom_said_to_have_formed(deviations, kept, at_most):
    found = [watched(deviations, seed, kept=kept) for seed in range(200)]
    confirmed = sum(any(state == "confirmed" for state, _, _ in states) for states, _ in found)
    assert confirmed <= at_most * 200
    if at_most:
        # What two measurements in a row decide is there far more often, among the same ones.
        assert sum(twice for _, twice in found) >= 3 * confirmed
        assert any(states for states, _ in found)


def test_what_has_formed_is_said_an_interval_later():
    found = [watched(7.0, seed)[0] for seed in range(50)]
    assert {tuple(states) for states in found} == {(("provisional", 0, 0), ("confirmed", 40, 0))}


def test_two_heads_one_after_the_other_are_no_two_in_a_row():
    found = said((0.4, 0.25), (0.25, 0.4), (0.25, 0.25))
    assert [state for state, _, _ in found] == ["provisional", "retracted"]


def test_a_tenth_of_the_way_and_three_deviations_are_needed():
    """A drift towards either says nothing."""
    assert said(*[(0.25 + 0.001 * number,) for number in range(70)]) == []


def test_claims_are_twice_too():
    forming = Forming([CLAIMED])
    table = pd.DataFrame([{"step": 0, "claim": "circuit", "causal_test": "passed"}])
    events = [event for step in (0, 10) for event in forming.take(step, {"claims": table})]
    assert [event.state for event in events] == ["provisional", "confirmed"]
    assert {event.series for event in events} == {"claimed formed"}


def test_other_tables_and_fields_are_passed_over():
    forming = Forming([SCORED])
    assert forming.take(0, {}) == []
    bare = {"heads": scores(0.9)["heads"].drop(columns="score")}
    assert forming.take(10, bare) == []


@pytest.fixture
def induction():
    """The noticer's own events, on made-up scores of heads under the name of the real table."""

    def at(step, score):
        when = moment(step)
        made = heads(when, score=[score] + [0.25] * 3)
        spec = dataclasses.replace(made.spec, name="induction")
        renamed = ["prefix_matching" if n == "score" else n for n in made.table.column_names]
        renamed = [n.replace("score_", "prefix_matching_") for n in renamed]
        table = made.table.rename_columns(renamed)
        return Measurement(
            moment=when, readings=(dataclasses.replace(made, spec=spec, table=table),)
        )

    return at


@pytest.mark.parametrize("begun_at", [None, 90])
def test_more_measurements_do_not_confirm_it_sooner(induction, begun_at):
    """Every 40 steps, and every 10 once it is provisional; also where it was taken up again."""
    steps = [0, 40, 80, 90, 100, 110, 120, 130]
    measured = [induction(step, 0.25 if step < 80 else 0.8) for step in steps]
    noticing = Noticing()
    if begun_at is not None:
        earlier = [one.readings[0].table for one in measured if one.moment.step <= begun_at]
        connection = duckdb.connect()
        connection.register("induction", pa.concat_tables(earlier))
        noticing.replay(connection, until=begun_at)
    notices = [notice for one in measured for notice in noticing.notice(one).notices]
    said = [(one.event.state, one.event.step, one.event.onset) for one in notices]
    expected = [("provisional", 80, 80), ("confirmed", 120, 80)]
    assert said == [one for one in expected if begun_at is None or one[1] > begun_at]
    assert {one.detected_at for one in notices} == {80}


def test_what_forms_is_noticed_among_few_measurements(induction):
    """Where a change of a series is not to be told yet."""
    noticing, notices = Noticing(), []
    for number, score in enumerate((0.25, 0.25, 0.25, 0.8, 0.9, 0.9)):
        found = noticing.notice(induction(10 * number, score))
        assert found.failures == ()
        notices += found.notices
    assert [(one.event.series, one.kind, one.event.state) for one in notices] == [
        ("induction head formed", "formation", "provisional"),
        ("induction head formed", "formation", "confirmed"),
    ]
    begun, formed = notices
    assert (begun.event.step, formed.event.step, formed.detected_at) == (30, 40, 30)
    assert str(formed) == "induction head formed: confirmed at step 40"
    (row,) = reading([formed], moment(40)).table.to_pylist()
    assert (row["kind"], row["n"], row["began"]) == ("formation", 5, 30)
    assert row["score"] == pytest.approx(0.65 / 0.75, abs=0.01)
    assert row["score_null"] == pytest.approx(0.1)
