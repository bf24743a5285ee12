"""What has formed is said at the second measurement in a row at which a head has it, once."""

import dataclasses

import pandas as pd
import pytest

from monitor.detection import Noticing, reading
from monitor.detection.events import Claim, Passing
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


def said(*measurements):
    forming = Forming([SCORED])
    return [
        (event.state, event.step, event.onset)
        for number, values in enumerate(measurements)
        for event in forming.take(10 * number, scores(*values))
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
