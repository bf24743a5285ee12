"""The series budget: where a table has more rows than fit, which stay and which are counted."""

import itertools

import numpy as np
import pytest

from monitor.record import Measurement
from tests.monitor.sinks.fabricated import heads, moment
from tests.monitor.sinks.scraped import value, values

LAYERS, PER_LAYER = 4, 8
# Score and its two companions, and entropy.
COLUMNS = 4


def noisy(step: int, best: list[int], chance: np.random.Generator) -> Measurement:
    """Scores of noise, above which `best` stand out by far less than the noise of one of them."""
    when = moment(step)
    score = chance.normal(0.1, 0.02, size=LAYERS * PER_LAYER)
    score[best] = 0.3 + chance.normal(0, 0.15, size=len(best))
    return Measurement(
        moment=when, readings=(heads(when, layers=LAYERS, heads=PER_LAYER, score=score),)
    )


def test_everything_is_shown_where_it_fits(make):
    sink = make(budget=LAYERS * PER_LAYER * COLUMNS)
    sink.write(noisy(1, [], np.random.default_rng(0)))
    assert len(values(sink, "phasewatch_heads_score", "layer", "head")) == LAYERS * PER_LAYER
    assert value(sink, "phasewatch_series_dropped_total") == 0


def test_the_budget_holds_and_what_is_left_out_is_counted(make):
    sink = make(budget=10 * COLUMNS + 1)
    for step in range(3):
        sink.write(noisy(step, [], np.random.default_rng(step)))
        shown = [
            len(values(sink, name, "layer", "head"))
            for name in (
                "phasewatch_heads_score",
                "phasewatch_heads_score_stderr",
                "phasewatch_heads_score_null",
                "phasewatch_heads_entropy_nats",
            )
        ]
        assert shown == [10] * COLUMNS
    left_out = 3 * (LAYERS * PER_LAYER - 10) * COLUMNS
    assert value(sink, "phasewatch_series_dropped_total") == left_out


def test_layers_are_summed_up_over_all_their_heads_whatever_is_left_out(make):
    sink = make(budget=2 * COLUMNS)
    given = noisy(1, [5, 20], np.random.default_rng(0))
    sink.write(given)
    by_layer = given.frame("heads").groupby("layer")["score"]
    for name, expected in (("max", by_layer.max()), ("mean", by_layer.mean())):
        shown = values(sink, f"phasewatch_heads_score_layer_{name}", "layer")
        assert shown == {(str(k),): pytest.approx(v, rel=1e-6) for k, v in expected.items()}
        assert len(shown) == LAYERS
    assert len(values(sink, "phasewatch_heads_entropy_layer_max_nats", "layer")) == LAYERS


def test_the_best_heads_stay_through_the_noise(make):
    sink = make(budget=10 * COLUMNS)
    chance = np.random.default_rng(0)
    best = [3, 11, 18, 30]
    for step in range(5):
        sink.write(noisy(step, best, chance))
    kept = []
    for step in range(5, 25):
        sink.write(noisy(step, best, chance))
        shown = set(values(sink, "phasewatch_heads_score", "layer", "head"))
        assert {(str(k // PER_LAYER), str(k % PER_LAYER)) for k in best} <= shown
        kept.append(shown)
    changes = sum(len(now - before) for before, now in itertools.pairwise(kept))
    # The best of every step on its own would change several heads at each of the 19 steps.
    assert changes <= 10


def test_a_head_that_was_once_best_stays_when_it_falls(make):
    sink = make(budget=4 * COLUMNS)
    chance = np.random.default_rng(0)
    sink.write(noisy(0, [9], chance))
    when = moment(1)
    score = np.full(LAYERS * PER_LAYER, 0.1)
    score[[1, 2]] = 0.2
    reading = heads(when, layers=LAYERS, heads=PER_LAYER, score=score)
    sink.write(Measurement(moment=when, readings=(reading,)))
    shown = values(sink, "phasewatch_heads_score", "layer", "head")
    assert shown["1", "1"] == pytest.approx(0.1)


@pytest.mark.parametrize("budget", [0, 1, COLUMNS - 1])
def test_a_budget_for_less_than_one_row_leaves_the_summaries(make, budget):
    sink = make(budget=budget)
    sink.write(noisy(1, [], np.random.default_rng(0)))
    assert not values(sink, "phasewatch_heads_score", "layer", "head")
    assert len(values(sink, "phasewatch_heads_score_layer_max", "layer")) == LAYERS
