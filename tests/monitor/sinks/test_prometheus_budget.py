"""The series budget: where a table has more rows than fit, which stay and which are counted."""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from monitor.record import Measurement
from tests.monitor.sinks.fabricated import HEADS, heads, moment
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


def expected_rows(reached: dict, rows: int) -> set:
    """The best of every field, then the second best of every field, until there are enough.

    `reached[field]` maps rows to the best that they ever were.
    """
    chosen: dict = {}
    ranked = [
        sorted((r for r in best if not math.isnan(best[r])), key=lambda r: (-best[r], r))
        for best in reached.values()
    ]
    for place in itertools.zip_longest(*ranked):
        for row in place:
            if row is not None and len(chosen) < rows:
                chosen[row] = True
    return set(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_the_rows_that_stay_are_those_of_the_definition(make, seed):
    """With equal scores, missing ones, and rows and fields that come and go."""
    chance, rows = np.random.default_rng(seed), 6
    sink = make(budget=rows * COLUMNS)
    everything = list(itertools.product(range(LAYERS), range(PER_LAYER)))
    reached: dict = {"score": {}, "entropy": {}}
    for step in range(6):
        score = chance.integers(0, 8, size=len(everything)) / 8
        score[chance.random(len(everything)) < 0.1] = math.nan if step != 3 else 0
        validity = ["ok" if ok else "no" for ok in chance.random(len(everything)) < 0.8]
        spec = HEADS.only(["score"]) if step == 2 else HEADS
        when = moment(step)
        reading = heads(
            when, layers=LAYERS, heads=PER_LAYER, score=score, validity=validity, spec=spec
        )
        sink.write(Measurement(moment=when, readings=(reading,)))
        frame = reading.table.to_pandas()
        valid = frame[frame["validity"] == "ok"].set_index(["layer", "head"])
        fields = [field.name for field in spec.fields]
        for field, (row, now) in itertools.product(fields, valid[fields].iterrows()):
            reached[field][row] = np.fmax(reached[field].get(row, math.nan), now[field])
        columns = sum(len(field.columns) for field in spec.fields)
        candidates = {f: {r: reached[f].get(r, math.nan) for r in valid.index} for f in fields}
        shown = values(sink, "phasewatch_heads_score", "layer", "head")
        assert {tuple(map(int, where)) for where in shown} == expected_rows(
            candidates, rows * COLUMNS // columns
        )


def test_what_was_not_measured_at_all_takes_no_places(make):
    sink = make(budget=3 * COLUMNS)
    when = moment(1)
    score = np.arange(LAYERS * PER_LAYER) / 100
    reading = heads(when, layers=LAYERS, heads=PER_LAYER, score=score)
    column = reading.table.schema.get_field_index("entropy")
    nothing = pa.nulls(len(reading.table), pa.float32())
    unmeasured = reading.table.set_column(column, "entropy", nothing)
    sink.write(Measurement(moment=when, readings=(dataclasses.replace(reading, table=unmeasured),)))
    shown = values(sink, "phasewatch_heads_score", "layer", "head")
    assert set(shown) == {("3", "5"), ("3", "6"), ("3", "7")}
    assert not values(sink, "phasewatch_heads_entropy_nats", "layer", "head")
