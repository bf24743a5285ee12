"""Services, a real Chromium, and two runs for it to look at."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from monitor.service import Service
from monitor.sinks import ParquetSink
from tests.monitor.service.training import measurements

# What a page may ask: the service that it is of, or the file.
_OWN = ("http://127.0.0.1:", "blob:http://127.0.0.1:", "blob:null", "data:", "file:")


@pytest.fixture
def serve(tmp_path):
    """Serves what is under the temporary folder, or another one."""
    made = []

    def start(root=tmp_path, **options):
        made.append(Service(root, **({"port": 0} | options)))
        return made[-1]

    yield start
    for service in made:
        service.close()


@pytest.fixture(scope="session")
def chromium():
    found = shutil.which("chromium")
    assert found, "this test needs chromium on the PATH (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@dataclass
class Visit:
    """Pages that are looked at, and what went wrong in them."""

    browser: Browser
    folder: Path
    problems: list[str] = field(default_factory=list)

    def open(self, url: str, *, scheme: str = "light", size: tuple[int, int] = (1440, 900)) -> Page:
        context = self.browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        page.on("response", self._answered)
        page.on("request", self._asked)
        page.goto(url)
        return page

    def picture(self, page: Page, name: str, *, full: bool = False) -> None:
        page.screenshot(path=self.folder / f"{name}.png", full_page=full)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text}")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(_OWN):
            self.problems.append(f"asked elsewhere: {request.url}")


@pytest.fixture
def visit(chromium, tmp_path):
    """Opens pages; whatever a console, a network or a dialog says there fails the test."""
    folder = Path(os.environ.get("PHASEWATCH_SCREENSHOTS", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    visit = Visit(chromium, folder)
    yield visit
    for context in chromium.contexts:
        context.close()
    assert visit.problems == []


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A root with the runs "a" and "b"."""
    root = tmp_path_factory.mktemp("trained")
    for run, name in (("a", "blocks_2L_s0"), ("b", "blocks_2L_s1")):
        sink = ParquetSink(root, run)
        for one in measurements(run, name):
            sink.write(one)
        sink.close()
    return root


@pytest.fixture(scope="session")
def served(trained):
    """The address of a service over them."""
    service = Service(trained, port=0)
    yield service.url
    service.close()
