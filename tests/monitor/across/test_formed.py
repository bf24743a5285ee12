"""When what formed: against a slow oracle, and on runs that would fool a hasty rule (noise that
crosses once, gaps, a rise before the first measurement, a restart, a number that nobody can test).
"""

import re

import numpy as np
import pandas as pd
import pytest

import monitor
from monitor.across import EVENTS, Claim, Passing, formations
from monitor.probes import PROBES
from monitor.sinks import ParquetSink
from tests.monitor.across.recorded import (
    CAUSAL,
    NONE,
    SCORED,
    SCORES,
    one_head,
    record_attempt,
    record_claims,
    record_scores,
)
from tests.oracles.formation import first_formed, holds


def only(root, event=SCORED) -> pd.Series:
    """The one row of the one run."""
    (row,) = [row for _, row in formations(root, events=[event]).iterrows()]
    return row


def test_a_rise_is_formed_at_the_first_of_two_measurements_and_after_the_one_before(tmp_path):
    record_scores(
        tmp_path,
        "r",
        {(0, 0): [0.0, 0.0, 0.0, 0.0, 0.0], (1, 2): [0.0, 0.05, 0.3, 0.6, 0.9]},
        null=0.02,
    )
    record_attempt(tmp_path, "r", seed=7, parameters=1234)
    row = only(tmp_path)
    assert row["run"] == "r"
    assert row["event"] == "scored"
    assert row["formed"]
    assert [row[f"step{part}"] for part in ("", "_after", "_by", "_last")] == [20, 10, 20, 40]
    assert [row[f"tokens{p}"] for p in ("", "_after", "_by", "_last")] == [2000, 1000, 2000, 4000]
    assert (row["layer"], row["head"], row["field"]) == (1, 2, "score")
    assert row["value"] == pytest.approx(0.9)
    assert row["value_stderr"] == pytest.approx(0.01)
    assert row["value_null"] == pytest.approx(0.02)
    assert (row["n"], row["measurements"], row["validity"]) == (16, 5, "ok")
    assert (row["seed"], row["parameters"]) == (7, 1234)


def test_the_bar_is_a_tenth_of_the_way_from_the_null_and_three_deviations(tmp_path):
    # With null .5 a tenth of the way is .55; three deviations of 16 sequences are 3.59 stderr.
    for run, value, stderr, formed in [
        ("at", 0.5502, 0.001, True),
        ("below", 0.5498, 0.001, False),
        ("sure", 0.70, 0.0557, True),
        ("unsure", 0.70, 0.0559, False),
    ]:
        record_scores(tmp_path, run, one_head(0.5, value, value), null=0.5, stderr=stderr)
        row = formations(tmp_path, [run], [SCORED]).iloc[0]
        assert bool(row["formed"]) is formed, run


def test_a_run_in_which_nothing_forms_names_the_head_that_came_nearest(tmp_path):
    record_scores(tmp_path, "r", {(0, 0): [0.0, 0.0, 0.01], (0, 1): [0.02, 0.01, 0.05]})
    row = only(tmp_path)
    assert not row["formed"]
    assert row[["step", "step_after", "step_by", "tokens"]].isna().all()
    assert (row["head"], row["step_last"], row["validity"]) == (1, 20, "ok")
    assert row["value"] == pytest.approx(0.05)


@pytest.mark.parametrize("crossings", [[0.9, 0, 0, 0, 0, 0], [0, 0, 0.9, 0, 0.9, 0]])
def test_noise_that_crosses_once_is_not_a_formation(tmp_path, crossings):
    record_scores(tmp_path, "r", one_head(*crossings))
    assert not only(tmp_path)["formed"]


def test_heads_that_cross_in_turn_are_not_a_formation(tmp_path):
    record_scores(tmp_path, "r", {(0, 0): [0.0, 0.9, 0.0, 0.9], (0, 1): [0.0, 0.0, 0.9, 0.0]})
    assert not only(tmp_path)["formed"]


def test_what_has_only_begun_is_not_confirmed(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0, 0, 0.9))
    row = only(tmp_path)
    assert not row["formed"]
    assert row["validity"] == "held at the last measurement only"


def test_what_had_formed_before_the_first_measurement_has_no_step(tmp_path):
    record_scores(tmp_path, "r", one_head(0.8, 0.9, 0.9), steps=[500, 600, 700])
    row = only(tmp_path)
    assert row["formed"]
    assert row[["step", "step_after", "tokens", "tokens_after"]].isna().all()
    assert (row["step_by"], row["tokens_by"]) == (500, 50_000)
    assert row["validity"] == "already formed at the first measurement"


def test_what_forms_and_goes_again_has_formed(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0, 0.5, 0.5, 0.1, 0, 0))
    row = only(tmp_path)
    assert (row["formed"], row["step"], row["value"]) == (True, 20, 0)


def test_gaps_widen_the_interval_and_do_not_break_it(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0, NONE, NONE, 0.5, NONE, 0.5, NONE))
    row = only(tmp_path)
    assert (row["step_after"], row["step_by"], row["step_last"]) == (10, 40, 60)
    assert row["measurements"] == 4


def test_steps_may_lie_anywhere(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0, 0, 0.4, 0.5), steps=[0, 1, 64, 1000, 9001])
    row = only(tmp_path)
    assert (row["step_after"], row["step"], row["step_last"]) == (64, 1000, 9001)


def test_a_run_that_did_not_count_tokens(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0.5, 0.5), tokens_a_step=None)
    row = only(tmp_path)
    assert row["step"] == 10
    assert row[["tokens", "tokens_after", "tokens_by", "tokens_last"]].isna().all()


def test_later_measurements_change_nothing_that_was_said(tmp_path):
    random = np.random.default_rng(0)
    values = np.clip(np.linspace(0, 0.5, 30)[:, None] + random.normal(0, 0.1, (30, 4)), 0, 1)
    heads = {(0, head): list(values[:, head]) for head in range(4)}
    said = []
    for end in range(3, 31):
        root = tmp_path / str(end)
        record_scores(root, "r", {head: series[:end] for head, series in heads.items()})
        row = only(root)
        if row["formed"]:
            said.append((row["step_after"], row["step"], row["head"]))
    assert len(said) > 10
    assert len(set(said)) == 1


def test_against_the_oracle_on_random_runs(tmp_path):
    random = np.random.default_rng(1)
    outcomes = set()
    for number in range(60):
        root = tmp_path / str(number)
        length, null = int(random.integers(2, 14)), float(random.choice([0.0, 0.2]))
        stderr, n = float(random.choice([0.001, 0.05])), int(random.choice([3, 16]))
        steps = sorted(random.choice(1000, length, replace=False).tolist())
        heads = {
            (int(layer), int(head)): [
                float(np.float32(random.choice([null, null + 0.09, null + 0.4, NONE])))
                for _ in range(length)
            ]
            for layer in range(2)
            for head in range(2)
        }
        # Values apart from one another: of equal ones the oracle need not choose the same.
        heads = {
            head: [float(np.float32(v + 1e-4 * i)) for v in series]
            for i, (head, series) in enumerate(heads.items())
        }
        record_scores(root, "r", heads, steps=steps, null=null, stderr=stderr, n=n)
        null, stderr = float(np.float32(null)), float(np.float32(stderr))
        held = {h: [holds(v, stderr, null, n) for v in series] for h, series in heads.items()}
        expected = first_formed(held, heads)
        row = only(root)
        if pd.isna(row["formed"]):
            outcomes.add("unknown")
            measured = [
                any(series[at] is not None for series in held.values()) for at in range(length)
            ]
            assert sum(measured) < 2
        elif expected is None:
            outcomes.add("not")
            assert not row["formed"]
        else:
            before, at, head = expected
            outcomes.add("formed" if before is not None else "already")
            assert (row["layer"], row["head"]) == head
            assert row["step_by"] == steps[at]
            if before is None:
                assert pd.isna(row["step_after"])
                assert pd.isna(row["step"])
            else:
                assert row["step_after"] == steps[before]
    assert outcomes >= {"not", "formed", "already"}


def test_a_score_that_falls(tmp_path):
    falling = Passing(name="falls", table="scores", field="score", full=-1.0)
    record_scores(tmp_path, "down", one_head(0, -0.05, -0.3, -0.4))
    record_scores(tmp_path, "up", one_head(0, 0.05, 0.3, 0.4))
    rows = formations(tmp_path, events=[falling]).set_index("run")
    assert rows.loc["down", "step"] == 20
    assert not rows.loc["up", "formed"]


# What cannot be said


def test_rows_that_cannot_be_interpreted_do_not_count(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0.9, 0.9), validity="attention is not causal")
    row = only(tmp_path)
    assert pd.isna(row["formed"])
    assert row["validity"] == "`score` was not measured: attention is not causal"


@pytest.mark.parametrize("given", [{"stderr": None}, {"n": 1}])
def test_a_number_of_unknown_uncertainty_does_not_count(tmp_path, given):
    record_scores(tmp_path, "r", one_head(0, 0.9, 0.9), **given)
    row = only(tmp_path)
    assert pd.isna(row["formed"])
    assert row["validity"].startswith("too few measurements: `score` was measured never")


def test_one_measurement_is_too_few(tmp_path):
    record_scores(tmp_path, "r", one_head(0.9))
    row = only(tmp_path)
    assert pd.isna(row["formed"])
    assert row["validity"].startswith("too few measurements: `score` was measured once")


def test_runs_with_different_tables_each_say_what_they_can(tmp_path):
    record_scores(tmp_path, "a", one_head(0, 0.5, 0.5))
    record_claims(tmp_path, "b", ("none", "not made"), ("none", "not made"))
    rows = formations(tmp_path, events=[SCORED, CAUSAL]).set_index(["run", "event"])
    assert rows.loc[("a", "scored"), "formed"]
    assert pd.isna(rows.loc[("a", "causal"), "formed"])
    assert rows.loc[("a", "causal"), "validity"] == "no table `circuit` was recorded"
    assert rows.loc[("b", "scored"), "validity"] == "no table `scores` was recorded"
    assert not rows.loc[("b", "causal"), "formed"]


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ({"field": "scor"}, "table `scores` has no column `scor`"),
        ({"where": {"kind": "k"}}, "table `scores` has no column `kind`"),
        ({"field": "bare"}, "`bare` has no null: give the event null="),
        ({"field": "bare", "null": 0.0}, "`bare` has neither a standard error nor a null_sd"),
        ({"by": ("layer",)}, "several rows for layer at one step"),
        ({"by": ()}, "several rows for a step at one step"),
    ],
)
def test_an_event_that_the_table_cannot_show_says_why(tmp_path, event, why):
    record_scores(tmp_path, "r", {(0, 0): [0, 0.5, 0.5], (0, 1): [0, 0, 0]})
    asked = Passing(**({"name": "x", "table": "scores", "field": "score"} | event))
    row = only(tmp_path, asked)
    assert pd.isna(row["formed"])
    assert why in row["validity"]


def test_rows_of_one_kind_alone(tmp_path):
    record_scores(tmp_path, "r", {(0, 0): [0, 0.5, 0.5], (1, 0): [0, 0, 0.5]})
    for layer, formed in [(0, True), (1, False), (2, None)]:
        asked = Passing(name="x", table="scores", field="score", where={"layer": layer}, by=())
        row = only(tmp_path, asked)
        assert pd.isna(row["formed"]) if formed is None else row["formed"] == formed


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"deviations": 0.0}])
def test_a_bar_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a share above 0"):
        Passing(name="x", table="scores", field="score", **wrong)


# Claims


def test_a_claim_counts_where_the_test_was_made(tmp_path):
    record_claims(
        tmp_path,
        "r",
        ("none", "not made"),
        ("attribution", "failed"),
        ("attribution", "not made"),
        ("induction circuit", "passed"),
        (None, None),
        ("induction circuit", "passed"),
    )
    row = only(tmp_path, CAUSAL)
    assert (row["formed"], row["step_after"], row["step"]) == (True, 10, 30)
    assert row["measurements"] == 4
    assert row[["layer", "head", "value"]].isna().all()


def test_a_circuit_that_nobody_tested_is_unknown_and_one_that_is_not_there_has_not_formed(tmp_path):
    record_claims(tmp_path, "untested", *[("attribution", "not made")] * 4)
    record_claims(tmp_path, "absent", *[("none", "not made")] * 4)
    record_claims(tmp_path, "refuted", *[("attribution", "failed")] * 4)
    record_claims(tmp_path, "unseen", *[("none", "not made")] * 2, *[(None, None)] * 2)
    rows = formations(tmp_path, events=[CAUSAL]).set_index("run")
    assert pd.isna(rows.loc["untested", "formed"])
    assert not rows.loc["absent", "formed"]
    assert rows.loc["absent", "validity"] == "no head attends as in an induction circuit"
    assert not rows.loc["refuted", "formed"]
    assert rows.loc["unseen", "step_last"] == 10, "not after what could no longer be seen"


def test_a_claim_needs_its_columns(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0.5, 0.5))
    row = only(tmp_path, Claim(name="x", table="scores", says="causal"))
    assert row["validity"] == "table `scores` has no column `claim`, `causal_test`"


# Runs


def test_what_a_restart_superseded_is_left_out(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0.5, 0.5, 0.5))
    assert only(tmp_path)["step"] == 10
    ParquetSink(tmp_path, "r").supersede(0)
    record_scores(tmp_path, "r", one_head(0, 0.5, 0.5), steps=[20, 30, 40])
    row = only(tmp_path)
    assert (row["step_after"], row["step"], row["measurements"]) == (20, 30, 4)


def test_no_runs_and_which_runs(tmp_path):
    assert formations(tmp_path).empty
    assert monitor.universality(formations(tmp_path)).empty
    for run in "ba":
        record_scores(tmp_path, run, one_head(0, 0.5))
    assert formations(tmp_path, events=[SCORED])["run"].tolist() == ["a", "b"]
    assert formations(tmp_path, ["b"], [SCORED])["run"].tolist() == ["b"]
    assert formations(tmp_path, ["b", "a", "b"], [SCORED])["run"].tolist() == ["b", "a"]
    assert formations(tmp_path, [], [SCORED]).empty
    with pytest.raises(ValueError, match=re.escape(f"unknown run in {tmp_path}: 'c'; known: a, b")):
        formations(tmp_path, ["c"])
    with pytest.raises(TypeError, match="expected a list of names"):
        formations(tmp_path, "ab")
    with pytest.raises(FileNotFoundError, match="no folder"):
        formations(tmp_path / "none")


def test_the_columns_do_not_depend_on_what_there_is(tmp_path):
    record_scores(tmp_path, "r", one_head(0, 0.5, 0.5))
    some, none = formations(tmp_path, events=[SCORED]), formations(tmp_path, [])
    assert some.dtypes.equals(none.dtypes)


def test_the_events_are_about_columns_that_are_recorded():
    recorded = {probe.spec.name: probe.spec for probe in PROBES}
    for event in EVENTS:
        if isinstance(event, Passing):
            assert recorded[event.table].field(event.field).null
            assert recorded[event.table].field(event.field).stderr
        elif event.table in recorded:
            spec = recorded[event.table]
            assert spec.field(event.field).text
            assert spec.field(event.test).text
    assert SCORES.name not in recorded
