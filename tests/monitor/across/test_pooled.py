"""Several runs on one axis: shares with their intervals, spreads and orders against values worked
out by hand; and what must not be pooled is not.
"""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

import monitor
from monitor.across import Passing, formations, leads, universality
from tests.monitor.across.recorded import SCORED, one_head, record_scores

FIRST = Passing(name="first", table="scores", field="score", where={"head": 0})
THEN = Passing(name="then", table="scores", field="score", where={"head": 1})


def rising(at: int | None, length: int = 20) -> list[float]:
    """Forms at the measurement `at` of every ten steps."""
    return [0.5 if at is not None and place >= at else 0.0 for place in range(length)]


def record_pair(root, run, first, then, **more):
    heads = {(0, 0): rising(first), (0, 1): rising(then)}
    record_scores(root, run, heads, **more)


def pooled(root, axis="step", event=SCORED) -> pd.Series:
    return universality(formations(root, events=[event]), axis).iloc[0]


def test_three_of_four_runs(tmp_path):
    for run, at in [("a", 4), ("b", 6), ("c", 11), ("d", None)]:
        record_scores(tmp_path, run, one_head(*rising(at)))
    row = pooled(tmp_path)
    assert (row["formed"], row["runs"], row["unknown"], row["timed"]) == (3, 4, 0, 3)
    assert row["share"] == 0.75
    interval = binomtest(3, 4).proportion_ci(0.95, method="exact")
    assert (row["share_low"], row["share_high"]) == pytest.approx((interval.low, interval.high))
    assert (row["median"], row["least"], row["most"]) == (60, 40, 110)
    assert row[["quartile_low", "quartile_high"]].isna().all()
    assert (row["resolution"], row["watched"], row["validity"]) == (10, 190, "ok")
    tokens = pooled(tmp_path, "tokens")
    assert (tokens["median"], tokens["least"], tokens["most"]) == (6000, 4000, 11_000)
    assert (tokens["resolution"], tokens["watched"]) == (1000, 19_000)


def test_quartiles_of_enough_runs(tmp_path):
    for at in range(2, 7):
        record_scores(tmp_path, f"r{at}", one_head(*rising(at)))
    row = pooled(tmp_path)
    assert (row["quartile_low"], row["median"], row["quartile_high"]) == (30, 40, 50)


def test_one_run_and_none_that_formed(tmp_path):
    record_scores(tmp_path, "a", one_head(*rising(None)))
    row = pooled(tmp_path)
    assert (row["formed"], row["runs"], row["timed"], row["validity"]) == (0, 1, 0, "ok")
    assert row["share_low"] == 0
    assert row["share_high"] == pytest.approx(0.975)
    assert np.isnan(row["median"])


def test_runs_of_which_nothing_is_known_are_not_counted_as_failures(tmp_path):
    record_scores(tmp_path, "a", one_head(*rising(4)))
    record_scores(tmp_path, "b", one_head(0.9))
    row = pooled(tmp_path)
    assert (row["formed"], row["runs"], row["unknown"]) == (1, 1, 1)
    only_unknown = universality(formations(tmp_path, ["b"], [SCORED])).iloc[0]
    assert (only_unknown["runs"], only_unknown["unknown"]) == (0, 1)
    assert np.isnan(only_unknown["share"])
    assert "too few measurements" in only_unknown["validity"]


def test_what_had_formed_before_counts_and_has_no_time(tmp_path):
    record_scores(tmp_path, "a", one_head(*rising(4)))
    record_scores(tmp_path, "b", one_head(*rising(0)))
    row = pooled(tmp_path)
    assert (row["formed"], row["timed"], row["median"]) == (2, 1, 40)


def test_steps_of_different_sizes_are_not_pooled_and_their_tokens_are(tmp_path):
    record_scores(tmp_path, "small", one_head(*rising(4)), tokens_a_step=100)
    record_scores(tmp_path, "large", one_head(*rising(2)), tokens_a_step=200)
    row = pooled(tmp_path)
    assert (row["formed"], row["runs"], row["timed"]) == (2, 2, 0)
    assert np.isnan(row["median"])
    assert (
        row["validity"] == "a step takes 100 tokens in one run and 200 in another: align by tokens"
    )
    tokens = pooled(tmp_path, "tokens")
    assert (tokens["median"], tokens["timed"], tokens["validity"]) == (4000, 2, "ok")


def test_runs_that_did_not_count_tokens_are_not_on_that_axis(tmp_path):
    record_scores(tmp_path, "a", one_head(*rising(4)), tokens_a_step=None)
    row = pooled(tmp_path, "tokens")
    assert (row["formed"], row["runs"], row["timed"]) == (1, 1, 0)
    assert row["validity"] == "no run counted its tokens: align by step"
    record_scores(tmp_path, "b", one_head(*rising(6)))
    row = pooled(tmp_path, "tokens")
    assert (row["formed"], row["timed"], row["median"], row["validity"]) == (2, 1, 6000, "ok")
    assert pooled(tmp_path)["timed"] == 2


def test_the_order_of_two_events(tmp_path):
    for run, first, then in [("a", 2, 5), ("b", 3, 10), ("c", 6, 4), ("d", 7, 7), ("e", 2, None)]:
        record_pair(tmp_path, run, first, then)
    record_pair(tmp_path, "f", 0, 8)
    (row,) = [row for _, row in leads(formations(tmp_path, events=[FIRST, THEN])).iterrows()]
    assert (row["first"], row["then"]) == ("first", "then")
    assert [row[name] for name in ("runs", "before", "after", "unclear")] == [5, 3, 1, 1]
    # Where the first had formed before it was watched, how long before is not known.
    assert row["timed"] == 4
    assert (row["median"], row["least"], row["most"]) == (15, -20, 70)
    assert row["resolution"] == 10
    tokens = leads(formations(tmp_path, events=[FIRST, THEN]), "tokens").iloc[0]
    assert (tokens["median"], tokens["before"]) == (1500, 3)


def test_the_order_stands_where_the_axis_does_not(tmp_path):
    record_pair(tmp_path, "a", 2, 5, tokens_a_step=None)
    found = formations(tmp_path, events=[FIRST, THEN])
    row = leads(found, "tokens").iloc[0]
    assert (row["before"], row["timed"]) == (1, 0)
    assert row["validity"] == "no run counted its tokens: align by step"
    record_pair(tmp_path, "b", None, 5)
    never = leads(formations(tmp_path, ["b"], [FIRST, THEN])).iloc[0]
    assert (never["runs"], never["validity"]) == (0, "no run formed both")


def test_events_that_fell_between_the_same_measurements_have_no_order(tmp_path):
    record_pair(tmp_path, "a", 7, 7)
    row = leads(formations(tmp_path, events=[FIRST, THEN])).iloc[0]
    assert (row["before"], row["after"], row["unclear"]) == (0, 0, 1)
    assert (row["median"], row["resolution"]) == (0, 10)


def test_an_axis_that_there_is_not(tmp_path):
    record_scores(tmp_path, "a", one_head(*rising(4)))
    found = formations(tmp_path, events=[SCORED])
    for ask in (monitor.universality, monitor.leads):
        with pytest.raises(ValueError, match="unknown axis: 'time'; known: step, tokens"):
            ask(found, "time")


def test_the_interval_covers_what_it_says():
    """Of many samples of five runs, the true share lies outside in at most 5%."""
    random = np.random.default_rng(0)
    for truth in (0.1, 0.5, 0.8):
        outside = 0
        counts = random.binomial(5, truth, 400)
        intervals = {}
        for count in range(6):
            formed = pd.DataFrame(
                {
                    "run": [f"r{i}" for i in range(5)],
                    "event": "x",
                    "formed": pd.array([i < count for i in range(5)], dtype="boolean"),
                    **{
                        name: pd.array([10] * 5, dtype="Int64")
                        for name in ("step", "step_after", "step_by", "step_last", "tokens_last")
                    },
                    "validity": "ok",
                }
            )
            row = universality(formed).iloc[0]
            intervals[count] = (row["share_low"], row["share_high"])
        for count in counts:
            low, high = intervals[int(count)]
            outside += not low <= truth <= high
        assert outside / len(counts) <= 0.05
