"""Every question of Grafana's dashboards has an answer: of a real Prometheus that scraped a run, and
of the service that reads it. Grafana's own packages make of the answers what is to be seen.
"""

from __future__ import annotations

import json
import re
import time
import urllib.parse

import pytest

from monitor.service import Service
from tests.dashboards import packages, played
from tests.dashboards.running import recorder, shipped
from tests.dashboards.shown import BOARDS, CHOSEN, PANELS, chosen, expressions, urls
from tests.dashboards.test_rules import RECORDED
from tests.programs import wait_for
from tests.recorded import get

each_board = pytest.mark.parametrize("name", BOARDS)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Prometheus that scraped two runs of the same measurements, and the service over them."""
    folder = tmp_path_factory.mktemp("played")
    told = {"attempt": "1", "model": "GPT2LMHeadModel"}
    runs = {run: recorder(folder / "runs", run, **told) for run in ("r", "s")}
    service = Service(folder / "runs", port=0)
    begun = time.time()
    try:
        with shipped(folder) as server:
            for measurement in played.measurements():
                for run, writing in runs.items():
                    writing.record(played.now(measurement, run), then=lambda: ())
                step = measurement.moment.step

                def scraped(step=step):
                    return (
                        len(server.ask("query", query=f"phasewatch_step == {step}")["result"]) == 2
                    )

                wait_for(scraped, f"step {step} to be scraped")
                time.sleep(1)
            wait_for(lambda: server.ask("query", query="ALERTS")["result"], "an alert")
            yield server, service, begun
    finally:
        for closing in (*runs.values(), service):
            closing.close()


@each_board
def test_every_question_to_prometheus_has_an_answer(served, name):
    server, _, begun = served
    found = []
    for at, expression, latest in expressions(BOARDS[name]):
        query = chosen(expression)
        if latest:
            result = server.ask("query", query=query)["result"]
            values = [[series["value"]] for series in result]
        else:
            asked = {"query": query, "start": begun, "end": time.time(), "step": 0.5}
            values = [series["values"] for series in server.ask("query_range", **asked)["result"]]
        numbers = [value for series in values for _, value in series if value != "NaN"]
        assert numbers, f"{at}: {query}"
        found.append(len(numbers))
    assert found


@each_board
def test_every_question_to_the_service_has_an_answer(served, name):
    _, service, _ = served
    for at, target in urls(BOARDS[name]):
        rows = answered(service, target)
        assert rows, at
        for column in target["columns"]:
            there = [row[column["selector"]] for row in rows]
            assert column["selector"] in MAY_LACK or any(v is not None for v in there), column
            numbers = [value for value in there if value is not None]
            if column["type"] == "number":
                assert all(isinstance(value, int | float) for value in numbers), column
            if column["type"] == "timestamp":
                assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", v) for v in numbers)


# A run that was replayed, and not trained, has no row in `attempts`.
MAY_LACK = {"seed", "model", "parameters"}


def answered(service: Service, target: dict) -> list[dict]:
    """The rows that the service answers to a query of Infinity's."""
    path, _, query = target["url"].partition("?")
    pairs = urllib.parse.parse_qsl(chosen(query), strict_parsing=bool(query))
    return json.loads(get(f"{service.url}{path}?{urllib.parse.urlencode(pairs)}")[0])


@each_board
def test_every_variable_has_values_and_is_used(served, name):
    server, _, _ = served
    board = BOARDS[name]
    text = json.dumps({key: board[key] for key in ("panels", "annotations", "links")})
    for variable in board["templating"]["list"]:
        text += json.dumps(variable.get("query", ""))
    for variable in board["templating"]["list"]:
        own = variable["name"]
        assert re.search(rf"\$\{{?{own}\b", text), f"{own} is of no use"
        if variable["type"] != "query":
            continue
        query = variable["query"]["query"]
        selector, _, label = query.removeprefix("label_values(").removesuffix(")").rpartition(", ")
        values = server.ask(f"label/{label}/values", **{"match[]": chosen(selector)})
        assert values, query
        if own in ("run", "runs", "other"):
            assert values == ["r", "s"]
        assert CHOSEN[own] in (*values, ".*", "|".join(values)), own
    named = {
        found for found in re.findall(r"\$\{?([a-z]\w*|__\w+)", text) if not found.startswith("__")
    }
    assert named == {variable["name"] for variable in board["templating"]["list"]}


def test_every_recording_rule_has_an_answer(served):
    server, _, _ = served
    for name, rule in RECORDED.items():
        assert server.ask("query", query=rule["expr"])["result"], name
        assert server.ask("query", query=name)["result"], name


def test_the_intervals_are_those_of_the_declared_errors(served):
    server, _, _ = served

    def value(query):
        (one,) = server.ask("query", query=query)["result"]
        return float(one["value"][1])

    (panel,) = [
        panel
        for name, panel in PANELS
        if name == "induction"
        and panel["title"] == "paired score"
        and "in_context" in panel["targets"][0]["expr"]
    ]
    of = {t["refId"]: chosen(t["expr"]) for t in panel["targets"]}
    metric = "phasewatch_in_context_paired_score"
    error = value(f'{metric}_stderr_nats{{run="r"}}')
    assert value(of["H"]) - value(of["A"]) == pytest.approx(1.96 * error, rel=1e-6)
    assert value(of["A"]) - value(of["L"]) == pytest.approx(1.96 * error, rel=1e-6)
    assert value(of["N"]) == value(f'{metric}_null_nats{{run="r"}}')


def test_of_many_rows_those_are_drawn_that_reached_most(served):
    server, _, _ = served
    (panel,) = [p for _, p in PANELS if p["title"] == "ratio"]
    drawn = {
        tuple(sorted(series["metric"].items()))
        for series in server.ask("query", query=chosen(panel["targets"][0]["expr"]))["result"]
    }
    every = server.ask("query", query='phasewatch_composition_ratio{run="r"}')["result"]
    assert len(drawn) == 12 < len(every)
    reached = server.ask("query", query='max_over_time(phasewatch_composition_ratio{run="r"}[10m])')
    most = sorted((float(series["value"][1]) for series in reached["result"]), reverse=True)[:12]
    labels = [{k: v for k, v in s["metric"].items() if k not in HIDDEN} for s in reached["result"]]
    best = [
        float(s["value"][1])
        for s, of in zip(reached["result"], labels, strict=True)
        if tuple(sorted(of.items())) in drawn
    ]
    assert sorted(best, reverse=True) == most


HIDDEN = {"run", "instance", "job", "__name__"}
