"""The live page while runs appear and grow, and while the service is gone; and with many points."""

from __future__ import annotations

import json
import re
import threading
from contextlib import closing

from playwright.sync_api import expect

from monitor.sinks import ParquetSink
from tests.monitor.service.looking import drawn, losses_of, run_page
from tests.monitor.service.test_leads import rises
from tests.monitor.service.training import measurements


def shaded(element, first: int, last: int) -> float:
    """How much is painted at the upper edge of a chart of 600 steps, between two of them."""
    return element.evaluate(
        """(element, [first, last]) => {
            const over = element.querySelector(".u-over").getBoundingClientRect();
            const canvas = element.querySelector(".uplot canvas");
            const box = canvas.getBoundingClientRect();
            const scale = canvas.width / box.width;
            const left = over.left - box.left + over.width * first / 600;
            const wide = Math.round(scale * over.width * (last - first) / 600);
            const copy = new OffscreenCanvas(canvas.width, canvas.height);
            const read = copy.getContext("2d", { willReadFrequently: true });
            read.drawImage(canvas, 0, 0);
            const { data } = read.getImageData(
                scale * left, scale * (over.top - box.top + 3), wide, 1);
            return data.filter((_value, at) => at % 4 === 3).reduce((a, b) => a + b) / wide;
        }""",
        [first, last],
    )


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
        assert shaded(heads, 165, 205) > 10 > shaded(heads, 30, 50)
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


def test_what_may_follow_is_said_with_how_often(tmp_path, serve, visit):
    for run, induction in {"a": 35, "b": 40}.items():
        rises(tmp_path, run, 20, induction, seed=ord(run))
    rises(tmp_path, "r", 25, 300)
    page = visit.open(run_page(serve().url, "r"))
    page.locator("#leads").scroll_into_view_if_needed()
    row = page.get_by_role("table", name="Early warnings").get_by_role("row").nth(1)
    expect(row).to_contain_text("2 of 2 other runs", timeout=60_000)
    expect(row).to_contain_text("induction head")
