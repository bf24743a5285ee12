"""Every question of Grafana's dashboards has an answer: of a real Prometheus that scraped a run,
and of the service that reads it. Grafana's own packages make of the answers what is to be seen.
"""

from __future__ import annotations

import itertools
import json
import re
import time
import urllib.parse

import pandas as pd
import pytest

from dashboards import panels
from monitor.service import Service
from tests.dashboards import packages, played
from tests.dashboards.running import recorder, shipped
from tests.dashboards.shown import BOARDS, CHOSEN, PANELS, chosen, targets
from tests.dashboards.test_rules import RECORDED
from tests.programs import Server, wait_for
from tests.recorded import get

each_board = pytest.mark.parametrize("name", BOARDS)


class Served:
    """What answers: a Prometheus, the service, and the time in which there is something to ask,
    one for all queries of a panel, as in Grafana.
    """

    def __init__(self, server: Server, service: Service, begun: float):
        self.server, self.service, self.begun = server, service, begun
        self.ended = time.time()

    def series(self, target: dict) -> list[dict]:
        """What Prometheus answers to a query of a panel: labels and values of each series."""
        query = chosen(target["expr"])
        if target.get("instant"):
            found = self.server.ask("query", query=query)["result"]
            return [{"metric": each["metric"], "values": [each["value"]]} for each in found]
        asked = {"query": query, "start": self.begun, "end": self.ended, "step": 0.5}
        return self.server.ask("query_range", **asked)["result"]

    def rows(self, target: dict) -> list[dict]:
        """What the service answers to a query of Infinity's."""
        path, _, query = target["url"].partition("?")
        pairs = urllib.parse.parse_qsl(chosen(query), strict_parsing=bool(query))
        return json.loads(get(f"{self.service.url}{path}?{urllib.parse.urlencode(pairs)}")[0])

    def answers(self, panel: dict) -> list[dict]:
        """The answers to a panel's queries in the form in which data sources give them."""
        made = []
        for target in panel["targets"]:
            if "url" in target:
                made.append(self._of_service(target))
            elif target.get("format") == "table":
                made.append(self._as_table(target))
            else:
                made += [_of_series(target, series) for series in self.series(target)]
        return made

    def _of_service(self, target: dict) -> dict:
        rows = self.rows(target)
        kinds = {"timestamp": "time"}
        fields = []
        for column in target["columns"]:
            values = [row[column["selector"]] for row in rows]
            kind = kinds.get(column["type"], column["type"])
            if kind == "string":
                values = [None if value is None else str(value) for value in values]
            if kind == "time":
                values = [pd.Timestamp(value).timestamp() * 1000 for value in values]
            fields.append({"name": column["text"], "type": kind, "values": values, "config": {}})
        return {"refId": target["refId"], "fields": fields}

    def _as_table(self, target: dict) -> dict:
        found = self.series(target)
        names = sorted({name for series in found for name in series["metric"]})
        fields = [
            {
                "name": name,
                "type": "string",
                "values": [series["metric"].get(name) for series in found],
                "config": {},
            }
            for name in names
        ]
        numbers = [float(series["values"][-1][1]) for series in found]
        fields.append({"name": "Value", "type": "number", "values": numbers, "config": {}})
        return {"refId": target["refId"], "fields": fields}


def _of_series(target: dict, series: dict) -> dict:
    labels = series["metric"]
    name = re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), target["legendFormat"])
    times, values = zip(*series["values"], strict=True)
    config = {"displayNameFromDS": name} if name else {}
    return {
        "refId": target["refId"],
        "fields": [
            {
                "name": "Time",
                "type": "time",
                "values": [time * 1000 for time in times],
                "config": {},
            },
            {
                "name": "Value",
                "type": "number",
                "values": [float(value) for value in values],
                "labels": labels,
                "config": config,
            },
        ],
    }


# The second run is measured at other steps, between those of the first.
LATER = {"r": 0, "s": 50}


def scraped(server: Server) -> dict[str, int]:
    """The steps of the runs."""
    found = server.ask("query", query="phasewatch_step")["result"]
    return {each["metric"]["run"]: int(each["value"][1]) for each in found}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A Prometheus that scraped two runs of the same measurements, and the service over them."""
    folder = tmp_path_factory.mktemp("played")
    told = {"attempt": "1", "model": "GPT2LMHeadModel"}
    runs = {run: recorder(folder / "runs", run, **told) for run in LATER}
    service = Service(folder / "runs", port=0)
    begun = time.time()
    try:
        with shipped(folder, service.url) as server:
            for measurement in played.measurements():
                for run, later in LATER.items():
                    runs[run].record(played.now(measurement, run, later=later), then=lambda: ())
                steps = {run: measurement.moment.step + later for run, later in LATER.items()}
                wait_for(lambda steps=steps: scraped(server) == steps, f"{steps} to be scraped")
                time.sleep(1)
            wait_for(lambda: server.ask("query", query="ALERTS")["result"], "an alert")
            # Rules are applied to what was scraped last, and alerts are seen in a range.
            time.sleep(2)
            yield Served(server, service, begun)
    finally:
        for closing in (*runs.values(), service):
            closing.close()


@each_board
def test_every_question_to_prometheus_has_an_answer(served, name):
    asked = targets(BOARDS[name], "expr")
    assert asked
    for at, target in asked:
        values = [value for series in served.series(target) for _, value in series["values"]]
        assert [value for value in values if value != "NaN"], f"{at}: {chosen(target['expr'])}"


@each_board
def test_every_question_to_the_service_has_an_answer(served, name):
    for at, target in targets(BOARDS[name], "url"):
        rows = served.rows(target)
        assert rows, at
        for column in target["columns"]:
            values = [row[column["selector"]] for row in rows]
            there = [value for value in values if value is not None]
            assert there or column["selector"] in MAY_LACK, column
            if column["type"] == "number":
                assert all(isinstance(value, int | float) for value in there), column
            if column["type"] == "timestamp":
                assert all(pd.Timestamp(value).tzinfo is not None for value in there), column


# A run that was replayed, and not trained, has no row in `attempts`.
MAY_LACK = {"seed", "model", "parameters"}


@each_board
def test_every_variable_has_values_and_is_used(served, name):
    server = served.server
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
    server = served.server
    for name, rule in RECORDED.items():
        assert server.ask("query", query=rule["expr"])["result"], name
        assert server.ask("query", query=name)["result"], name


def test_the_intervals_are_those_of_the_declared_errors(served):
    server = served.server

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


def test_by_step_other_attempts_are_left_out(served):
    (panel,) = [p for _, p in PANELS if p["title"] == "score by step"]
    for target in panel["targets"]:
        own, another = chosen(target["expr"]), target["expr"].replace("$attempt", "2")
        assert served.server.ask("query", query=own)["result"]
        assert not served.server.ask("query", query=chosen(another))["result"]


def test_of_many_rows_those_are_drawn_that_reached_most(served):
    server = served.server
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


@pytest.fixture(scope="module")
def answered(served):
    """Every panel with the answers to its queries."""
    return [(panel, served.answers(panel)) for _, panel in PANELS]


@pytest.fixture(scope="module")
def page():
    with packages.page() as opened:
        yield opened


def told(page, panel, answers):
    """The frames that are drawn, each a list of fields."""
    return page.evaluate("([panel, answers]) => window.told(panel, answers)", [panel, answers])


def values_of(answers: list[dict], name: str) -> dict[float, float]:
    """By time, what a series of this name answered."""
    (found,) = [a for a in answers if a["fields"][1]["config"]["displayNameFromDS"] == name]
    times, values = found["fields"]
    return dict(zip(times["values"], values["values"], strict=True))


def test_what_was_scraped_is_drawn_by_steps_that_rise_with_the_last_of_each(answered, page):
    drawn = [p for p in answered if p[0]["type"] == "trend" and "expr" in p[0]["targets"][0]]
    assert len(drawn) == 7
    for panel, answers in drawn:
        steps = values_of(answers, "step")
        # It was scraped more often than it was measured, and Trend would draw nothing of that.
        assert len(steps) > len(set(steps.values())) == len(played.STEPS)
        (fields,) = told(page, panel, answers)
        of = {field["name"]: field["values"] for field in fields}
        assert of.pop(panel["options"]["xField"]) == list(played.STEPS)
        assert {"value", "null"} <= set(of)
        for name, values in of.items():
            last = {steps[at]: value for at, value in sorted(values_of(answers, name).items())}
            assert values == [last.get(step) for step in played.STEPS], panel["title"]


def test_what_is_stored_is_drawn_by_steps_that_rise(answered, page):
    drawn = [p for p in answered if p[0]["type"] == "trend" and "url" in p[0]["targets"][0]]
    assert len(drawn) > 30
    unsorted = 0
    for panel, answers in drawn:
        (answer,) = answers
        step, by, value = (field["values"] for field in answer["fields"])
        stored = {(s, b): v for s, b, v in zip(step, by, value, strict=True)}
        # A row for each step and series, or there would be nothing to tell them apart by.
        assert len(stored) == len(value)
        (fields,) = told(page, panel, answers)
        assert fields[0]["name"] == panel["options"]["xField"]
        steps = fields[0]["values"]
        assert steps == sorted(set(step))
        unsorted += step != sorted(step)
        kind = answer["fields"][1]["name"]
        for field in fields[1:]:
            key = field["name"].removeprefix(f"{kind} ")
            assert field["name"] == (key if kind == "run" else f"{kind} {key}")
            assert field["values"] == [stored.get((s, key)) for s in steps]
            if kind == "layer":
                assert field["colour"] == colour_of(int(key))
    assert unsorted > 30


def colour_of(layer: int) -> str:
    return "#808080" if layer < 0 else panels.LAYERS[layer % len(panels.LAYERS)]


def test_every_panel_has_something_to_show_in_its_unit(answered, page):
    for panel, answers in answered:
        frames = told(page, panel, answers)
        fields = [field for fields in frames for field in fields if field["type"] != "time"]
        assert any(v is not None for field in fields for v in field["values"]), panel["title"]
        unit = panel["fieldConfig"]["defaults"]["unit"]
        written = [field["written"] for field in fields if field["values"][-1] is not None]
        if panel["type"] == "timeseries" and unit.startswith("suffix:"):
            ending = f" {unit.removeprefix('suffix:')}"
            assert all(text.endswith(ending) for text in written), panel["title"]
        if panel["type"] == "state-timeline":
            assert set(written) == {"confirmed"}


def test_lines_have_the_colours_of_their_layers_and_nulls_are_dashed(answered, page):
    layers, nulls = 0, 0
    for panel, answers in (p for p in answered if p[0]["type"] == "timeseries"):
        for field in itertools.chain(*told(page, panel, answers)):
            # Of edges between heads there are two layers, and no colour.
            if found := re.search(r"(?<!source )(?<!target )\blayer (-?\d+)\b", field["name"]):
                assert field["colour"] == colour_of(int(found[1])), field["name"]
                layers += 1
            if re.search(r"\bnull$", field["name"]):
                assert field["custom"]["lineStyle"] == {"fill": "dash", "dash": [10, 6]}
                nulls += 1
    assert min(layers, nulls) > 200


def test_the_colour_changes_at_the_null(answered, page):
    seen = set()
    for panel, answers in answered:
        if panel["title"] == "Beyond the null, now":
            for _, field in told(page, panel, answers):
                expected = panels.BELOW if field["values"][-1] < 0 else panels.ABOVE
                assert field["colour"] == expected, field["name"]
                seen.add(expected)
    assert seen == {panels.BELOW, panels.ABOVE}


def test_panels_are_drawn(answered, page):
    drawn = {}
    for panel, answers in answered:
        asked = [panel, answers]
        if not page.evaluate("([panel, answers]) => window.drawn(panel, answers)", asked):
            assert panel["type"] not in drawn
            continue
        drawn[panel["type"]] = drawn.get(panel["type"], 0) + 1
        text = page.inner_text("body")
        if panel["type"] in ("timeseries", "trend"):
            page.wait_for_function("window.painted() > 100", timeout=10_000)
        assert text.strip(), panel["title"]
        assert not page.errors, (panel["title"], page.errors)
    # How states are drawn is published in no package.
    assert set(drawn) == {panel["type"] for panel, _ in answered} - {"state-timeline"}
