"""Grafana's dashboards: those that are shipped are those that are made, they show every metric and
nothing else, and every question in them has an answer: of a real Prometheus that scraped a run, and
of the service that reads it.
"""

from __future__ import annotations

import colorsys
import itertools
import json
import re
import time
import urllib.parse
from pathlib import Path

import pytest
import yaml

import dashboards
from dashboards import build, panels, rows
from monitor.probes import OPTIONAL, PROBES
from monitor.service import Service
from tests.dashboards import played
from tests.dashboards.running import recorder, shipped
from tests.dashboards.test_rules import RECORDED, declared, make
from tests.programs import wait_for
from tests.recorded import get

__all__ = ["make"]

HOME = Path(dashboards.__file__).parent
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(build.FOLDER.glob("*.json"))}
each_board = pytest.mark.parametrize("name", BOARDS)

# What Prometheus says of itself.
ITS_OWN = {"ALERTS", "scrape_duration_seconds", "up"}

CHOSEN = {
    "run": "r",
    "other": "s",
    "runs": "r|s",
    "attempt": "1",
    "layer": ".*",
    "one": "0",
    "band": "1.96",
    "__range": "600s",
}


def shown(board: dict) -> list[dict]:
    """The panels of a dashboard, those in closed rows too."""
    every = [[panel, *panel.get("panels", ())] for panel in board["panels"]]
    return [panel for panel in itertools.chain(*every) if panel["type"] != "row"]


PANELS = [(name, panel) for name, board in BOARDS.items() for panel in shown(board)]


def chosen(text: str) -> str:
    """As Grafana asks it, with what was chosen in place of variables."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: CHOSEN[found[1]], text)


def expressions(board: dict) -> list[tuple[str, str, bool]]:
    """Of every panel and annotation that asks Prometheus: where it is, what, and whether only for
    the latest value.
    """
    asked = [(p["title"], t) for p in shown(board) for t in p["targets"]]
    asked += [(a["name"], a["target"]) for a in board["annotations"]["list"]]
    return [(at, t["expr"], t.get("instant", False)) for at, t in asked if "expr" in t]


def urls(board: dict) -> list[tuple[str, dict]]:
    """Of every panel and annotation that asks the service: where it is, and the query."""
    asked = [(p["title"], t) for p in shown(board) for t in p["targets"]]
    asked += [(a["name"], a["target"]) for a in board["annotations"]["list"]]
    return [(at, target) for at, target in asked if "url" in target]


def metrics(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    words = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"[\w:]*phasewatch_[\w:]+|[\w:]+(?=\{)", words))


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


def test_what_is_shipped_is_what_is_made():
    for name, text in build.pages().items():
        shipped_text = (build.FOLDER / name).read_text()
        assert shipped_text == text, f"{name} is stale: run make dashboards"
    assert {path.name for path in build.FOLDER.iterdir()} == set(build.pages())


def test_every_table_has_a_dashboard():
    tables = {probe.spec.name for probe in (*PROBES, *OPTIONAL)} | {"transitions"}
    assert set(rows.SHOWN_ON) == tables
    assert set(rows.SHOWN_ON.values()) <= set(BOARDS)


def test_every_metric_is_shown_and_nothing_else_is_named(make):
    known = declared(make)
    named = set()
    for board in BOARDS.values():
        for at, expression, _ in expressions(board):
            assert metrics(expression), at
            named |= metrics(expression)
    assert named - set(RECORDED) - ITS_OWN <= known
    assert known <= named, known - named
    assert set(RECORDED) <= named


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


@each_board
def test_panels_are_side_by_side_and_fit(name):
    places = {}
    for panel in itertools.chain(*([p, *p.get("panels", ())] for p in BOARDS[name]["panels"])):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in itertools.product(
            range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])
        ):
            assert places.setdefault(cell, panel["id"]) == panel["id"], panel["title"]
    identities = [panel["id"] for panel in shown(BOARDS[name])]
    assert len(identities) == len(set(identities))


@pytest.mark.parametrize(("name", "panel"), PANELS, ids=lambda given: "")
def test_a_panel_says_what_it_shows(name, panel):
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs)) > 0
    expected = {"prometheus": "${prometheus}", "yesoreyeram-infinity-datasource": "${infinity}"}
    for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
        assert source["uid"] == expected[source["type"]]


def test_every_number_is_shown_with_what_fools_it_its_source_its_unit_and_its_null():
    for spec in rows.SPECS.values():
        of_table = [panel for _, panel in PANELS if spec.source in panel["description"]]
        for field in (field for field in spec.fields if field.is_number):
            metric = spec.metric(field.name) + "{"
            asking = [p for p in of_table if any(metric in t.get("expr", "") for t in p["targets"])]
            of_field = [p for p in asking if field.help in p["description"]]
            assert of_field, metric
            for panel in of_field:
                assert field.fooled_by in panel["description"]
                assert field.null in panel["description"]
                unit = panel["fieldConfig"]["defaults"]["unit"]
                assert unit == (f"suffix: {field.unit}" if field.unit else "none")
                dashed = [
                    o for o in panel["fieldConfig"]["overrides"] if "[10, 6]" in json.dumps(o)
                ]
                assert bool(dashed) == bool(field.null)


def test_thresholds_are_at_the_null():
    gauges = [panel for _, panel in PANELS if panel["type"] == "bargauge"]
    assert len(gauges) == sum(
        any(f.null and f.is_number for f in spec.fields) for spec in rows.SPECS.values()
    )
    for panel in gauges:
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert [step["value"] for step in steps] == [None, 0]
        for target in panel["targets"]:
            value, _, null = target["expr"].partition(" - ")
            (of_value,), (of_null,) = metrics(value), metrics(null)
            assert "_null" in of_null
            assert of_null.replace("_null", "") == of_value


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [*panels.LAYERS, panels.BELOW, panels.ABOVE])
def test_colours_stand_out_from_dark_and_light_backgrounds(colour):
    for background in ("#181b1f", "#ffffff"):
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_a_layer_has_one_colour_everywhere():
    hues = {
        round(colorsys.rgb_to_hsv(*(int(c[i : i + 2], 16) for i in (1, 3, 5)))[0], 2)
        for c in panels.LAYERS
    }
    assert len(set(panels.LAYERS)) == len(panels.LAYERS) == 8
    assert len(hues) >= 7
    coloured = 0
    for _, panel in PANELS:
        for target in panel["targets"]:
            if "{{layer}}" not in target.get("legendFormat", "") or panel["type"] == "bargauge":
                continue
            coloured += 1
            for layer in (-1, 0, 7, 8, 13, 95):
                name = target["legendFormat"].replace("{{layer}}", str(layer))
                fixed = [
                    override["properties"][0]["value"]["fixedColor"]
                    for override in panel["fieldConfig"]["overrides"]
                    if override["matcher"]["id"] == "byRegexp"
                    and re.search(override["matcher"]["options"].strip("/"), name)
                ]
                assert fixed == ["#808080" if layer < 0 else panels.LAYERS[layer % 8]]
    assert coloured > 100


def test_sources_are_those_that_are_provisioned():
    folder = HOME / "provisioning"
    given = [
        source
        for path in sorted((folder / "datasources").glob("*.yml"))
        for source in yaml.safe_load(path.read_text())["datasources"]
    ]
    by_uid = {source["uid"]: source for source in given}
    assert len(by_uid) == len(given) == 3
    for board in BOARDS.values():
        for variable in board["templating"]["list"]:
            if variable["type"] == "datasource":
                assert by_uid[variable["current"]["value"]]["type"] == variable["query"]
    for source in given:
        assert re.match(r"http://127\.0\.0\.1:\d+$", source["url"])
    for path in (folder / "dashboards").glob("*.yml"):
        (provider,) = yaml.safe_load(path.read_text())["providers"]
        assert provider["type"] == "file"


def test_exact_times_are_those_of_the_annotations_that_the_sink_writes():
    from monitor.sinks.grafana import _annotation
    from tests.monitor.detection.made_up import notice

    (row,) = played.table.reading(
        [notice("confirmed", 9, 4)],
        played.Moment(
            run="r", attempt=1, step=9, tokens=None, time=played.datetime.now(played.UTC)
        ),
    ).table.to_pylist()
    written = json.loads(
        _annotation(row, played.Moment(run="r", attempt=1, step=9, tokens=None, time=row["time"]))
    )
    for board in BOARDS.values():
        for annotation in board["annotations"]["list"]:
            if annotation["target"].get("tags"):
                assert {chosen(tag) for tag in annotation["target"]["tags"]} <= set(written["tags"])
