"""Leads: known ones, in one run and over runs, told once they are worked out."""

import time

import numpy as np
import pytest

from monitor.record import HEAD, LAYER, Field, Measurement, ProbeSpec, Reading
from monitor.sinks import ParquetSink
from tests.monitor.service.served import ask, record, refused
from tests.monitor.sinks.fabricated import moment
from tests.programs import wait_for

SPEC = ProbeSpec(
    name="induction",
    help="Made-up scores.",
    source="Nobody 2026",
    dims=(LAYER, HEAD),
    fields=(
        Field(name="prefix_matching", help="Made up.", null="chance"),
        Field(name="beyond_position", help="Made up.", null="chance"),
        Field(name="previous_token", help="Made up.", null="chance"),
    ),
    needs=(),
)
LEAD = {"first": "previous-token head", "then": "induction head"}
FITTED = {"first": "previous-token head up", "then": "induction head up"}


def rises(root, run, previous, induction, *, measurements=60, tokens=True, seed=0):
    """One head whose two numbers rise around these measurements, which are ten steps apart."""
    random, sink = np.random.default_rng(seed), ParquetSink(root, run)
    for at in range(measurements):
        step = 10 * at
        when = moment(step, run=run, tokens=100 * step if tokens else None)
        columns = {"layer": [0], "head": [0], "n": [16], "validity": ["ok"]}
        before, score = (
            1 / (1 + np.exp(-1.5 * (at - midpoint))) + 0.03 * random.normal()
            for midpoint in (previous, induction)
        )
        values = {"previous_token": before, "prefix_matching": score, "beyond_position": score}
        for name, value in values.items():
            columns |= {name: [value], f"{name}_stderr": [0.01], f"{name}_null": [0.0]}
        reading = Reading.build(SPEC, when, columns)
        sink.write(Measurement(moment=when, readings=(reading,)))


def leads(service, *runs, axis="step"):
    def ready():
        told = ask(service, "/api/leads", run=[*runs], axis=axis)
        return told if told["ready"] else None

    return wait_for(ready, "leads")


def only(rows, kind, **more):
    (row,) = (row for row in rows if row["kind"] == kind and more.items() <= row.items())
    return row


@pytest.mark.parametrize(("axis", "unit"), [("step", 1), ("tokens", 100)])
def test_a_lead_is_found_in_both_ways(tmp_path, serve, axis, unit):
    rises(tmp_path, "r", 20, 35)
    told = leads(serve(), "r", axis=axis)
    assert told["axis"] == axis
    assert told["runs"] == [{"run": "r", "ready": True, "until": 590, "error": None}]
    formed = only(told["within"], "formation", run="r", **LEAD)
    assert formed["lead"] == pytest.approx(150 * unit, abs=10 * unit)
    # Each lies between two measurements that are ten steps apart.
    assert formed["lead_high"] - formed["lead_low"] == 20 * unit
    assert formed["lead_low"] <= formed["lead"] <= formed["lead_high"]
    fit = only(told["within"], "fit", run="r", **FITTED)
    assert fit["lead"] == pytest.approx(150 * unit, abs=10 * unit)
    assert fit["lead_low"] < 150 * unit < fit["lead_high"]
    assert formed["sure"]
    assert fit["sure"]


def test_what_happens_at_once_has_no_order(tmp_path, serve):
    rises(tmp_path, "r", 30, 30)
    within = leads(serve(), "r")["within"]
    assert {row["kind"] for row in within} == {"formation", "fit"}
    assert not any(row["sure"] for row in within)


def test_where_nothing_happens_there_is_no_lead(tmp_path, serve):
    rises(tmp_path, "r", 300, 300)
    told = leads(serve(), "r")
    assert told["within"] == told["over"] == told["warnings"] == []
    assert told["runs"][0]["error"] is None


def test_over_runs(tmp_path, serve):
    for run, (previous, induction) in {"a": (20, 35), "b": (20, 40), "c": (40, 30)}.items():
        rises(tmp_path, run, previous, induction, seed=ord(run))
    told = leads(serve(), "a", "b", "c")
    for kind, names in (("formation", LEAD), ("fit", FITTED)):
        over = only(told["over"], kind, **names)
        assert (over["runs"], over["before"], over["after"], over["unclear"]) == (3, 2, 1, 0)
        assert over["median"] == pytest.approx(150, abs=20)
        assert over["least"] == pytest.approx(-100, abs=20)
        assert over["most"] == pytest.approx(200, abs=20)


@pytest.mark.parametrize(("axis", "unit"), [("step", 1), ("tokens", 100)])
def test_what_may_follow(tmp_path, serve, axis, unit):
    """In two of three other runs with such a head an induction head came after it."""
    for run, (previous, induction) in {"a": (20, 35), "b": (20, 40), "c": (40, 30)}.items():
        rises(tmp_path, run, previous, induction, seed=ord(run))
    rises(tmp_path, "r", 25, 300)
    service = serve()
    (row,) = (
        row for row in leads(service, "r", axis=axis)["warnings"] if row["outcome"] == LEAD["then"]
    )
    assert (row["run"], row["moved"]) == ("r", LEAD["first"])
    assert (row["followed"], row["runs"]) == (2, 3)
    assert row["share_low"] < 2 / 3 < row["share_high"]
    assert row["least"] == pytest.approx(150 * unit, abs=20 * unit)
    assert row["most"] == pytest.approx(200 * unit, abs=20 * unit)
    assert row["expected"] == pytest.approx((250 + 175) * unit, abs=30 * unit)
    # In a run that has everything nothing is to be expected.
    assert leads(service, "a", axis=axis)["warnings"] == []


def test_tokens_that_nobody_counted_give_no_lead_in_tokens(tmp_path, serve):
    rises(tmp_path, "r", 20, 35, tokens=False)
    told = leads(serve(), "r", axis="tokens")
    assert [row["lead"] for row in told["within"]] == [None]
    assert "no run counted its tokens" in told["over"][0]["validity"]


def test_an_answer_comes_before_it_is_ready_and_says_so(tmp_path, serve, monkeypatch):
    rises(tmp_path, "r", 20, 35)
    service, worked_out = serve(), []

    def slow(root, run, axis):
        worked_out.append(run)
        time.sleep(0.3)
        raise RuntimeError("no luck")

    monkeypatch.setattr("monitor.service.leading._worked_out", slow)
    told = ask(service, "/api/leads", run="r")
    assert not told["ready"]
    assert told["runs"] == [{"run": "r", "ready": False, "until": None, "error": None}]
    assert "RuntimeError: no luck" in leads(service, "r")["runs"][0]["error"]
    ask(service, "/api/leads", run="r")
    assert worked_out == ["r"]


def test_what_is_known_holds_until_the_new_state_is_worked_out(tmp_path, serve, monkeypatch):
    rises(tmp_path, "r", 20, 35)
    service = serve()
    before = leads(service, "r")
    monkeypatch.setattr("monitor.service.leading._SELDOM", 1e9)
    record(tmp_path, 900)
    told = ask(service, "/api/leads", run="r")
    assert told["runs"] == [{"run": "r", "ready": False, "until": 590, "error": None}]
    assert told["within"] == before["within"]
    monkeypatch.setattr("monitor.service.leading._SELDOM", 0)
    assert leads(service, "r")["runs"][0]["until"] == 900


def test_what_is_not_there(tmp_path, serve):
    record(tmp_path, 1)
    service = serve()
    assert refused(service, "/api/leads", run="x")[0] == 404
    code, told = refused(service, "/api/leads", run="r", axis="time")
    assert code == 400
    assert "known: step, tokens" in told["error"]
