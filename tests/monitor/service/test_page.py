"""The live page as its readers meet it: in a real Chromium, before a real service, over a recorded
training. Set PHASEWATCH_SCREENSHOTS to a folder to look at the pictures.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import threading
import urllib.parse
import urllib.request
from contextlib import closing

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from monitor.sinks import ParquetSink
from tests.monitor.service.training import EVIL, measurements
from tests.recorded import get

SECTIONS = ("training", "heads", "circuit", "transitions", "leads", "concepts", "superposition",
            "neurons", "all")  # fmt: skip


def run_page(url: str, *runs: str, **place: str) -> str:
    query = urllib.parse.urlencode([("run", run) for run in runs] + [*place.items()])
    return f"{url}/#/run?{query}"


def figure(page, name: str):
    return page.locator(f'[data-figure="{name}"]')


def press(page, name: str, **more):
    page.get_by_role("button", name=name, exact=True, **more).first.click()


def hash_of(page) -> dict[str, list[str]]:
    return urllib.parse.parse_qs(urllib.parse.urlparse(page.url).fragment.partition("?")[2])


def drawn(page, name: str):
    """Waits until a figure has its lines."""
    element = figure(page, name)
    element.scroll_into_view_if_needed()
    expect(element.locator(".legend li").first).to_be_visible()
    return element


def test_the_list_leads_to_a_run(served, visit):
    page = visit.open(served)
    rows = page.locator("table.runs tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first.locator(".state")).to_have_text("running")
    expect(page.get_by_role("status").first).to_have_text("live")
    visit.picture(page, "list")
    page.get_by_role("link", name="a", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("a")
    page.go_back()
    expect(rows).to_have_count(2)
    for run in "ab":
        page.get_by_label(f"Choose {run}").check()
    press(page, "Lay the chosen runs over each other")
    expect(page.get_by_role("heading", level=1)).to_have_text("2 runs over each other")


def test_an_empty_root_says_so_until_a_run_appears(tmp_path, serve, visit):
    page = visit.open(serve().url)
    expect(page.get_by_role("main")).to_contain_text("No runs yet")
    with closing(ParquetSink(tmp_path, "late")) as sink:
        sink.write(next(measurements("late")))
        expect(page.get_by_role("link", name="late")).to_be_visible()


def test_a_probe_that_begins_later_gets_its_section(tmp_path, serve, visit):
    page = visit.open(run_page(serve().url, "r"))
    expect(page.get_by_role("main")).to_contain_text("names r, which is not here")
    everything = iter(measurements())
    with closing(ParquetSink(tmp_path, "r")) as sink:
        sink.write(losses_of(next(everything)))
        drawn(page, "score")
        expect(page.locator("#heads")).to_contain_text("expected the probe 'induction'")
        sink.write(next(everything))
        drawn(page, "heads")


def test_an_unknown_run_is_named(served, visit):
    page = visit.open(run_page(served, "nobody"))
    expect(page.get_by_role("main")).to_contain_text("names nobody, which is not here")
    expect(page.get_by_role("main")).to_contain_text("There are: a, b")


def test_a_run_page_has_every_section(served, visit):
    page = visit.open(run_page(served, "a"))
    for name in SECTIONS:
        section = page.locator(f"section#{name}")
        section.scroll_into_view_if_needed()
        expect(section.get_by_role("heading", level=2)).to_be_visible()
    for name in ("loss", "score", "heads", "concepts", "superposition", "neurons", "all"):
        element = drawn(page, name)
        expect(element.locator("canvas").first).to_be_visible()
        expect(element.locator("figcaption")).to_contain_text("null")
    heads = figure(page, "heads")
    expect(heads.locator("figcaption")).to_contain_text("Fooled by: Copying by position")
    expect(heads.locator(".legend")).to_contain_text("10 × too few tokens")
    expect(page.locator("#circuit svg .node")).to_have_count(2)
    expect(page.locator("#circuit")).to_contain_text("hurts more than any random group")
    expect(page.locator("#transition-list .state.confirmed").first).to_be_visible()
    # No probe of this training names neurons, or learns a dictionary.
    expect(page.locator("#concepts")).not_to_contain_text("Concepts from a few neurons")
    page.evaluate("scrollTo(0, 0)")
    visit.picture(page, "run", full=True)


def losses_of(one):
    """A measurement without all else."""
    kept = tuple(each for each in one.readings if each.spec.name == "in_context")
    return dataclasses.replace(one, readings=kept)


def test_a_table_that_is_missing_says_what_would_measure_it(tmp_path, serve, visit):
    with closing(ParquetSink(tmp_path, "bare")) as sink:
        sink.write(losses_of(next(measurements("bare"))))
    page = visit.open(run_page(serve().url, "bare"))
    lacking = {"heads": "'induction'", "circuit": "'circuit'", "concepts": "concepts="}
    for name, word in lacking.items():
        expect(page.locator(f"section#{name}")).to_contain_text(word)
    expect(page.locator("#transition-list")).to_contain_text("Nothing was said")


def seen(page) -> dict[str, object]:
    """What a reader sees of the state of the page."""
    pressed = page.locator('.bar2 [aria-pressed="true"]').all_inner_texts()
    shown = figure(page, "heads").locator('.legend [aria-pressed="true"]').all_inner_texts()
    return {
        "pressed": [*pressed, *shown],
        "selects": [s.input_value() for s in page.locator("main select").all()],
        "slider": page.locator(".slider output").inner_text(),
        "legend": figure(page, "heads").locator(".legend li").all_inner_texts(),
        "head": page.locator("#head-title").inner_text(),
        "title": page.locator("#map-title").inner_text(),
    }


def test_every_control_is_in_the_permalink(served, visit):
    page = visit.open(run_page(served, "a", "b"))
    drawn(page, "heads")
    for name in ("Tokens", "Log"):
        press(page, name)
    page.get_by_role("group", name="Vertical").get_by_role("button", name="Log").click()
    page.get_by_label("Align at").select_option("induction head formed")
    heads = drawn(page, "heads")
    heads.get_by_label("Field").select_option("induction:previous_token")
    expect(page.locator("#map-title")).to_contain_text("previous token")
    heads.locator(".legend button").first.click()
    expect(heads.locator('.legend [aria-pressed="false"]')).to_have_count(1)
    page.get_by_role("slider", name="Step").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator(".slider output")).to_have_text("step 570")
    figure(page, "map").get_by_label("Run").select_option("b")
    page.locator("#circuit").scroll_into_view_if_needed()
    page.locator("#circuit .node rect").click()
    expect(page.locator("#head-title")).to_have_text("Head 0.1")
    concepts = drawn(page, "concepts")
    concepts.get_by_role("combobox", name="concept").select_option("capital")
    concepts.get_by_role("combobox", name="layer").select_option("1")
    expect(concepts.locator(".legend li")).to_have_count(2)
    place = hash_of(page)
    assert place["run"] == ["a", "b"]
    assert (place["axis"], place["x"], place["y"]) == (["tokens"], ["log"], ["log"])
    assert (place["step"], place["head"]) == (["570"], ["0.1"])
    assert place["align"] == ["induction head formed"]
    drawn(page, "heads")
    before = seen(page)
    page.reload()
    drawn(page, "concepts")
    drawn(page, "heads")
    expect(page.locator("#map-title")).to_contain_text("previous token at step 570")
    assert seen(page) == before
    visit.picture(page, "aligned")


def test_the_other_controls(served, visit):
    page = visit.open(run_page(served, "a", step="300"))
    heads = drawn(page, "heads")
    expect(page.locator("#map-title")).to_contain_text("at step 300")
    press(page, "Play")
    expect(page.locator(".slider output")).not_to_have_text("step 300")
    press(page, "Pause")
    press(page, "Latest")
    expect(page.locator("#map-title")).to_contain_text("at step 600")
    press(page, "Wall clock")
    expect(heads.locator(".plot")).to_have_attribute("aria-label", re.compile("from 0 s to 10 min"))
    press(page, "Step")
    # The numbers as a table.
    heads.get_by_role("button", name="Table").click()
    expect(heads.locator("tbody tr").first).to_be_visible()
    heads.get_by_role("button", name="Table").click()
    expect(heads.locator("tbody tr")).to_have_count(0)
    # A drag is a zoom, and a click chooses a step.
    heads.locator(".u-over").hover()
    box = heads.locator(".u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 50, steps=4)
    page.mouse.up()
    expect(heads.get_by_role("button", name="Reset zoom")).to_be_visible()
    assert "step" not in hash_of(page)
    heads.get_by_role("button", name="Reset zoom").click()
    expect(heads.get_by_role("button", name="Reset zoom")).to_be_hidden()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + 50)
    expect(page.locator("#map-title")).to_contain_text("at step 450")
    expect(heads.locator(".tip")).to_contain_text("1.0")
    # A band leads to what is said of it, and that to the step.
    page.locator("[data-transition]").first.click()
    at = page.locator("#transition-list tbody tr").first.inner_text()
    assert f"step {hash_of(page)['step'][0]}" in page.locator(".slider output").inner_text(), at
    page.get_by_role("link", name="Neurons").click()
    expect(page.locator("#neurons h2")).to_be_focused()
    page.get_by_label("Lay another run over it").select_option("b")
    expect(page.get_by_role("heading", level=1)).to_have_text("2 runs over each other")
    press(page, "Leave out a")
    expect(page.get_by_role("heading", level=1)).to_have_text("b")


def test_the_keyboard_reaches_heads_and_charts(served, visit):
    page = visit.open(run_page(served, "a"))
    heads = drawn(page, "heads")
    grid = page.get_by_role("grid")
    expect(page.locator("#map-title")).to_contain_text("step 600")
    grid.focus()
    page.keyboard.press("ArrowDown")
    cell = page.get_by_role("gridcell")
    expect(cell).to_have_attribute("aria-label", "head 1.0: 0.650 ± 0.020, null 0.05")
    page.keyboard.press("Enter")
    expect(page.locator("#head-title")).to_be_focused()
    panel = page.locator(".panel")
    expect(panel).to_contain_text("induction")
    expect(panel.locator("figure").first.locator(".legend li")).to_have_count(1)
    visit.picture(page, "head")
    panel.get_by_role("button", name="Close").click()
    expect(grid).to_be_focused()
    plot = heads.locator(".plot")
    plot.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(heads.locator(".tip")).to_be_visible()
    expect(page.locator("#said")).to_contain_text("1.0")
    page.keyboard.press("+")
    expect(heads.get_by_role("button", name="Reset zoom")).to_be_visible()
    page.keyboard.press("Escape")
    expect(heads.get_by_role("button", name="Reset zoom")).to_be_hidden()
    page.keyboard.press("Enter")
    assert int(hash_of(page)["step"][0]) > 500


def test_csv_is_what_the_service_answers(served, visit):
    page = visit.open(run_page(served, "a", axis="tokens"))
    heads = drawn(page, "heads")
    with page.expect_download() as waiting:
        heads.get_by_role("button", name="CSV").click()
    with open(waiting.value.path(), newline="") as text:  # noqa: PTH123 -- newlines as they are
        rows = [*csv.DictReader(text)]
    asked = "run=a&table=induction&field=prefix_matching&axis=tokens&top=6"
    told = json.loads(get(f"{served}/api/series?{asked}")[0])
    assert len(rows) == len(told) == 6 * 61

    def row(one):
        return tuple(
            None if one[name] in ("", None) else float(one[name])
            for name in ("layer", "head", column, "value", "stderr", "null")
        )

    column = "tokens"
    shown = {row(one): one["validity"] for one in rows}
    column = "axis"
    # Of a series that is whole it is not said at every row that it is.
    expected = {row(one): one["validity"] for one in told}
    assert shown.keys() == expected.keys()
    assert {key: word or "ok" for key, word in shown.items()} == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_scheme_is_the_systems_until_the_reader_chooses(served, visit, scheme):
    def dark():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 300

    page = visit.open(run_page(served, "a", head="1.0"), scheme=scheme)
    drawn(page, "heads")
    assert dark() == (scheme == "dark")
    page.locator("#theme").click()
    assert dark() != (scheme == "dark")
    assert "theme" not in page.url
    page.reload()
    drawn(page, "heads")
    assert dark() != (scheme == "dark")
    visit.picture(page, f"chosen-against-{scheme}", full=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("place", ["list", "run", "phone"])
def test_axe_finds_no_serious_fault(served, visit, place, scheme):
    url = served if place == "list" else run_page(served, "a", "b", head="1.0", step="300")
    page = visit.open(url, scheme=scheme, size=(390, 844) if place == "phone" else (1440, 900))
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    if place != "list":
        for name in ("heads", "concepts", "all"):
            drawn(page, name)
        figure(page, "heads").get_by_role("button", name="Table").click()
    found = Axe().run(page).response["violations"]
    grave = [
        (one["id"], one["impact"], [node["html"][:120] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert grave == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visit.picture(page, f"{place}-{scheme}", full=True)


def test_names_are_never_markup(served, visit):
    page = visit.open(run_page(served, "a"))
    concepts = drawn(page, "concepts")
    expect(concepts.locator(".legend")).to_contain_text(EVIL)
    concepts.get_by_role("button", name="Table").click()
    expect(concepts.locator("tbody")).to_contain_text(EVIL)
    assert page.locator("img").count() == 0
    page = visit.open(run_page(served, EVIL))
    expect(page.get_by_role("main")).to_contain_text(EVIL)
    assert page.locator("img").count() == 0


def test_the_page_may_ask_nobody_else(served):
    with urllib.request.urlopen(served, timeout=10) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'")
    assert "unsafe" not in policy


def test_a_run_that_grows_is_watched_until_its_band_appears(tmp_path, serve, visit):
    service, ended = serve(), threading.Event()
    everything = iter(measurements("live"))
    sink = ParquetSink(tmp_path, "live")
    for _ in range(15):
        sink.write(next(everything))

    def train():
        for one in everything:
            if ended.wait(0.05):
                return
            sink.write(one)

    writer = threading.Thread(target=train)
    try:
        page = visit.open(run_page(service.url, "live", step="20"))
        heads = drawn(page, "heads")
        button = heads.locator(".legend button").nth(1)
        button.focus()
        expect(page.locator("#transition-list")).not_to_contain_text("induction head formed")
        writer.start()
        band = page.locator("#transition-list tr", has_text="induction head formed")
        expect(band.locator(".state")).to_have_text("confirmed", timeout=60_000)
        expect(heads.locator(".plot")).to_have_attribute(
            "aria-label", re.compile("induction head formed, confirmed at 180")
        )
        # Where the reader was is kept.
        expect(page.locator(".slider output")).to_have_text("step 20")
        expect(button).to_be_focused()
        writer.join()
        expect(page.locator(".top")).to_contain_text("61 measurements", timeout=60_000)
        visit.picture(page, "grown")
    finally:
        ended.set()
        if writer.ident is not None:
            writer.join()
        sink.close()


def test_a_service_that_goes_and_comes_back(trained, serve, visit):
    service = serve(trained)
    port = int(service.url.rpartition(":")[2])
    page = visit.open(run_page(service.url, "a"))
    drawn(page, "heads")
    service.close()
    status = page.locator("#connection")
    expect(status).to_have_text("disconnected, retrying")
    visit.picture(page, "disconnected")
    assert serve(trained, port=port).url == service.url
    expect(status).to_have_text("live", timeout=30_000)
    drawn(page, "heads")
    page.close()
    # Browsers say of themselves that nobody answered.
    visit.problems[:] = [one for one in visit.problems if "ERR_" not in one]


def test_a_hundred_thousand_points_are_drawn(served, visit):
    page = visit.open(served)
    count = 100_000
    line = {"run": "a", "dims": {}, "axis": [*range(count)],
            "value": [2 + (i * 7919 % 1000) / 1000 for i in range(count)],
            "stderr": [0.1] * count, "null": [4.0] * count}  # fmt: skip
    told = json.dumps({"table": "in_context", "field": {}, "axis": "step", "series": [line]})
    page.route("**/api/series?*field=score*", lambda route: route.fulfill(
        body=told, content_type="application/json"))  # fmt: skip
    page.evaluate(
        "new PerformanceObserver((list) => (window.long ??= []).push(...list.getEntries().map("
        "(one) => Math.round(one.duration)))).observe({type: 'longtask', buffered: true})"
    )
    page.evaluate("location.hash = '#/run?run=a'")
    score = drawn(page, "score")
    plot = score.locator(".plot")
    plot.focus()
    for key in ("End", "ArrowLeft", "ArrowLeft", "+", "+", "Escape"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    print("long tasks with 100,000 points, in ms:", page.evaluate("window.long ?? []"))
    expect(score.locator(".legend")).to_contain_text("score")
    visit.picture(page, "hundred-thousand")
