"""The metrics page of many runs: within its budget, made only when something is new, and steady."""

import numpy as np
import prometheus_client.parser

from monitor.detection import table
from monitor.record import Measurement
from monitor.sinks import ParquetSink
from monitor.sinks.exposition import Page
from tests.monitor.detection.made_up import notice
from tests.monitor.service.served import record
from tests.monitor.sinks.fabricated import heads, moment
from tests.recorded import page

LAYERS, PER_LAYER = 4, 8
# A score, its error and its null, and an entropy.
COLUMNS = 4


def samples(service):
    families = prometheus_client.parser.text_string_to_metric_families(page(service.url))
    return [sample for family in families for sample in family.samples]


def shown(service, run="r"):
    """The heads on the page."""
    return {
        (int(s.labels["layer"]), int(s.labels["head"]))
        for s in samples(service)
        if s.name == "phasewatch_heads_score" and s.labels["run"] == run
    }


def left_out(service, run="r"):
    (number,) = (
        s.value
        for s in samples(service)
        if s.name == "phasewatch_series_left_out" and s.labels["run"] == run
    )
    return number


def write(root, step, score, run="r"):
    when = moment(step, run=run)
    reading = heads(when, layers=LAYERS, heads=PER_LAYER, score=score)
    ParquetSink(root, run).write(Measurement(moment=when, readings=(reading,)))


def test_the_budget_is_one_for_the_whole_page(tmp_path, serve):
    chance = np.random.default_rng(0)
    for run in "abc":
        write(tmp_path, 1, chance.random(LAYERS * PER_LAYER), run=run)
        record(tmp_path, 1, run="small")
    everything = len(samples(serve(budget=10_000)))
    for budget in (40, 100, 200, 300, everything):
        service = serve(budget=budget)
        count = len(samples(service))
        assert count <= budget
        # Whole rows are shown, and so less than one of them is left in each table.
        assert count > min(budget, everything) - 4 * COLUMNS - 8
        told = [left_out(service, run) for run in ("a", "b", "c", "small")]
        assert sum(told) == everything - count


def test_what_needs_little_is_shown_whole(tmp_path, serve):
    write(tmp_path, 1, np.arange(LAYERS * PER_LAYER), run="large")
    record(tmp_path, 1, run="small")
    service = serve(budget=100)
    assert len(shown(service, "small")) == 4
    assert left_out(service, "small") == 0
    assert 0 < len(shown(service, "large")) < LAYERS * PER_LAYER


def test_a_head_that_was_once_best_stays(tmp_path, serve):
    low, high = np.full(LAYERS * PER_LAYER, 0.1), np.full(LAYERS * PER_LAYER, 0.1)
    high[9] = 0.9
    for step in range(20):
        write(tmp_path, step, high if step == 0 else low + 0.001 * step)
    # It was best before the service looked,
    service = serve(budget=60)
    assert (1, 1) in shown(service)
    # and this one is best at one measurement after that.
    high[9], high[30] = 0.1, 0.8
    write(tmp_path, 20, high)
    assert {(1, 1), (3, 6)} <= shown(service)
    for step in (21, 22):
        write(tmp_path, step, low)
        assert {(1, 1), (3, 6)} <= shown(service)


def test_nothing_is_rendered_anew_where_nothing_was_measured(tmp_path, serve, monkeypatch):
    made, of_runs = [], Page.of_runs

    def counted(*arguments):
        made.append(arguments)
        return of_runs(*arguments)

    monkeypatch.setattr(Page, "of_runs", counted)
    record(tmp_path, 1)
    service = serve()
    assert page(service.url) == page(service.url)
    assert len(made) == 1
    record(tmp_path, 2)
    assert page(service.url) == page(service.url)
    assert len(made) == 2


def test_rows_that_last_are_shown_until_they_are_replaced(tmp_path, serve):
    def say(step, *notices):
        when = moment(step)
        reading = table.reading(notices, when)
        ParquetSink(tmp_path, "r").write(Measurement(moment=when, readings=(reading,)))

    def confirmed():
        return {
            s.labels["series"]: s.value
            for s in samples(service)
            if s.name == "phasewatch_transitions_confirmed"
        }

    say(10, notice("confirmed", 10, 5, "first"))
    say(20, notice("provisional", 20, 15, "second"))
    service = serve()
    assert confirmed() == {"first": 1, "second": 0}
    say(30, notice("confirmed", 30, 15, "second"))
    assert confirmed() == {"first": 1, "second": 1}
    ParquetSink(tmp_path, "r").supersede(after=10)
    assert confirmed() == {"first": 1}
