"""Grafana's dashboards as they are shipped: made of the declarations, complete, in the form that
Grafana has, and readable.
"""

from __future__ import annotations

import colorsys
import itertools
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

import dashboards
from dashboards import build, panels, rows
from monitor.detection import table
from monitor.probes import OPTIONAL, PROBES
from monitor.record import Moment
from monitor.sinks import grafana
from tests.dashboards import packages
from tests.dashboards.shown import BOARDS, PANELS, chosen, metrics, shown, targets
from tests.dashboards.test_rules import RECORDED, declared
from tests.monitor.detection.made_up import notice

HOME = Path(dashboards.__file__).parent
each_board = pytest.mark.parametrize("name", BOARDS)

# What Prometheus says of itself.
ITS_OWN = {"ALERTS", "scrape_duration_seconds", "up"}


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
        for at, target in targets(board, "expr"):
            assert metrics(target["expr"]), at
            named |= metrics(target["expr"])
    assert named - set(RECORDED) - ITS_OWN <= known
    assert known <= named, known - named
    assert set(RECORDED) <= named


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
                assert unit == (f"suffix:{field.unit}" if field.unit else "none")
                dashed = [
                    o for o in panel["fieldConfig"]["overrides"] if "[10, 6]" in json.dumps(o)
                ]
                assert bool(dashed) == bool(field.null)


def test_thresholds_are_at_the_null():
    beyond = [panel for _, panel in PANELS if panel["title"] == "Beyond the null, now"]
    assert len(beyond) == sum(
        any(f.null and f.is_number for f in spec.fields) for spec in rows.SPECS.values()
    )
    for panel in beyond:
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
            if "{{layer}}" not in target.get("legendFormat", "") or panel["type"] == "stat":
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
    when = Moment(run="r", attempt=1, step=9, tokens=None, time=datetime.now(UTC))
    (row,) = table.reading([notice("confirmed", 9, 4)], when).table.to_pylist()
    written = json.loads(grafana._annotation(row, when))
    asking = [
        annotation["target"]["tags"]
        for board in BOARDS.values()
        for annotation in board["annotations"]["list"]
        if "tags" in annotation["target"]
    ]
    assert len(asking) == len(BOARDS)
    for tags in asking:
        assert {chosen(tag) for tag in tags} <= set(written["tags"])


def test_they_are_what_the_schema_of_grafana_says():
    assert packages.said_by("schema.mjs", *sorted(build.FOLDER.glob("*.json"))) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda board: board.update(refreshes="1s"),
        lambda board: board.update(graphTooltip=7),
        lambda board: board["templating"]["list"][0].update(refresh=9),
        lambda board: board["templating"]["list"][0].update(named="x"),
        lambda board: shown(board)[0]["options"].update(colorMode="loud"),
        lambda board: shown(board)[0]["options"].update(colour="red"),
        lambda board: shown(board)[0]["fieldConfig"]["defaults"].update(unit=3),
        lambda board: shown(board)[0]["gridPos"].pop("w"),
        lambda board: shown(board)[6]["fieldConfig"]["defaults"]["custom"].update(drawStyle="oil"),
    ],
)
def test_the_schema_has_nothing_else(change, tmp_path):
    board = json.loads((build.FOLDER / "overview.json").read_text())
    change(board)
    changed = tmp_path / "overview.json"
    changed.write_text(json.dumps(board))
    assert packages.said_by("schema.mjs", changed)
