"""Reports, opened from disk in a real Chromium: they answer as the service does."""

from __future__ import annotations

import itertools
import json
import urllib.parse

import pytest
from playwright.sync_api import expect
from typer.testing import CliRunner

from monitor.cli import app
from monitor.query import read
from monitor.service import reporting
from monitor.sinks import ParquetSink
from tests.monitor.service.training import EVIL, measurements
from tests.recorded import get

ANSWER = """async ([path, params]) => {
  const { answer } = await import("phasewatch/data.js");
  return answer(path, params);
}"""

QUESTIONS = [
    ("/api/tables", {}),
    ("/api/transitions", {}),
    ("/api/rows", {"table": "induction"}),
    ("/api/rows", {"table": "induction", "step": 101, "field": "prefix_matching"}),
    ("/api/rows", {"table": "circuit", "step": 10}),
    ("/api/rows", {"table": "in_context", "step": 0}),
    *(
        ("/api/series", {"table": table, "field": field, "axis": axis, **more})
        for axis in ("step", "tokens", "time")
        for table, field, more in (
            ("induction", "prefix_matching", {}),
            ("induction", "prefix_matching", {"top": 2}),
            ("induction", "entropy", {"layer": 1, "head": 0}),
            ("concepts", "auc", {"concept": EVIL}),
            ("in_context", "score", {}),
        )
    ),
]


@pytest.fixture(scope="module")
def report(trained, tmp_path_factory):
    return reporting.write(trained, tmp_path_factory.mktemp("report") / "report.html", ["a"])


def near(found, expected):
    """The same, to the digits that a report keeps."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            near(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            near(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found == expected


def test_it_answers_as_the_service_does(report, served, visit):
    page = visit.open(report.as_uri())
    for path, params in QUESTIONS:
        asked = {"run": "a", **params}
        found = page.evaluate(ANSWER, [path, asked])
        form = {"format": "columns"} if path == "/api/series" else {}
        expected = json.loads(get(f"{served}{path}?{urllib.parse.urlencode(asked | form)}")[0])
        if path == "/api/tables":
            assert [one["table"] for one in found] == [one["table"] for one in expected]
        else:
            near(found, expected)


def test_it_shows_everything_and_asks_for_nothing(report, visit):
    page = visit.open(report.as_uri())
    expect(page.get_by_role("heading", level=1)).to_have_text("a")
    expect(page.get_by_role("status").first).to_contain_text("Report of 2")
    for name in ("loss", "score", "heads", "concepts", "superposition", "neurons"):
        figure = page.locator(f'[data-figure="{name}"]')
        figure.scroll_into_view_if_needed()
        expect(figure.locator(".legend li").first).to_be_visible()
    for section in ("circuit", "transitions", "leads"):
        table = page.locator(f"#{section} table").first
        table.scroll_into_view_if_needed()
        expect(table).to_be_visible()
    expect(page.get_by_text("Not part of this report")).to_have_count(0)
    for axis, linear in itertools.product(("Tokens", "Wall clock", "Step"), ("Log", "Linear")):
        page.get_by_role("button", name=axis, exact=True).click()
        page.get_by_role("button", name=linear, exact=True).first.click()
    page.evaluate("window.scrollTo(0, 0)")
    visit.picture(page, "report", full=True)
    assert report.stat().st_size < 3_000_000


def test_several_runs_lie_over_each_other(trained, tmp_path, visit):
    both = reporting.write(trained, tmp_path / "both.html", ["a", "b"])
    page = visit.open(f"{both.as_uri()}#/run?run=a&run=b")
    expect(page.get_by_role("heading", level=1)).to_have_text("2 runs over each other")


def test_of_very_many_rows_the_best_are_kept_and_that_is_said(
    trained, tmp_path, visit, monkeypatch
):
    monkeypatch.setattr(reporting, "_NUMBERS", 3_000)
    monkeypatch.setattr(reporting, "_STEPS", 20)
    small = reporting.write(trained, tmp_path / "small.html", ["a"])
    page = visit.open(small.as_uri())
    expect(page.get_by_role("status").first).to_contain_text("induction")
    steps = sorted(set(read(trained, "induction", run="a")["step"]))
    asked = {"run": "a", "table": "induction", "field": "prefix_matching"}
    found = page.evaluate(ANSWER, ["/api/series", asked])["series"]
    best = next(one for one in found if one["dims"] == {"layer": 1, "head": 0})
    assert best["axis"][0] == steps[0]
    assert best["axis"][-1] == steps[-1]
    assert len(best["axis"]) == 20
    last = page.evaluate(ANSWER, ["/api/rows", asked])
    assert len(last["columns"]["head"]) == 6
    before = page.evaluate(ANSWER, ["/api/rows", asked | {"step": steps[-1] - 1}])
    assert 0 < len(before["columns"]["head"]) < 6


def test_the_command_says_what_it_wrote_and_what_is_wrong(trained, tmp_path):
    out = tmp_path / "r.html"
    told = CliRunner().invoke(app, ["report", "b", "--root", str(trained), "-o", str(out)])
    assert told.exit_code == 0, told.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    for arguments, words in (
        (["c", "--root", str(trained)], "'c'"),
        (["--root", str(tmp_path / "none")], "no folder"),
        (["--root", str(tmp_path)], "no runs in"),
        (["b", "--root", str(trained), "-o", str(tmp_path / "x" / "r.html")], "No such file"),
    ):
        told = CliRunner().invoke(app, ["report", *arguments])
        assert told.exit_code == 1
        assert words in told.output


def test_a_run_that_is_read_again_replaces_the_report(tmp_path):
    root, out = tmp_path / "runs", tmp_path / "r.html"
    sink = ParquetSink(root, "r")
    sizes = []
    for one in itertools.islice(measurements("r"), 4):
        sink.write(one)
        sizes.append(reporting.write(root, out).stat().st_size)
    sink.close()
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
