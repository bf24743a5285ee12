"""Grafana's own packages, as npm has them: installed once, into a folder that is kept."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.programs import program

HERE = Path(__file__).with_name("npm")


@functools.cache
def folder() -> Path:
    """Where they are, with the programs of this project beside them."""
    wanted = (HERE / "package.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "phasewatch-tests"
    installed = cache / f"npm-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if not installed.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Elsewhere first: what was broken off must not be taken for whole.
        with tempfile.TemporaryDirectory(dir=cache) as made:
            (Path(made) / "package.json").write_bytes(wanted)
            options = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock")
            done = subprocess.run(
                [program("npm"), "install", *options],
                cwd=made, check=False, capture_output=True, text=True, timeout=500,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            # Another process may have been faster.
            with suppress(OSError):
                Path(made).rename(installed)
            Path(made).mkdir(exist_ok=True)
    for path in HERE.iterdir():
        # At once: another process may be about to read it.
        with tempfile.NamedTemporaryFile(dir=installed, delete=False) as new:
            new.write(path.read_bytes())
        Path(new.name).replace(installed / path.name)
    return installed


def said_by(script: str, *arguments: str | Path) -> Any:
    """What one of the programs in `npm` prints, as JSON."""
    done = subprocess.run(
        [program("node"), script, *map(str, arguments)],
        cwd=folder(), check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def page() -> Iterator[Page]:
    """The page of `npm/page.jsx` in a browser that reaches nothing; what goes wrong in it is in
    `errors`.
    """
    made = said_by("bundle.mjs")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program("chromium"),
            args=["--no-sandbox", "--disable-background-networking"],
        )
        opened = browser.new_page(viewport={"width": 840, "height": 340})
        errors: list[str] = []
        opened.on("pageerror", lambda error: errors.append(str(error)))
        opened.route(
            "**/*",
            lambda route: (
                route.fulfill(body="<!doctype html><title>panels</title><body></body>")
                if route.request.is_navigation_request()
                else route.abort()
            ),
        )
        opened.goto("http://localhost/")
        opened.add_style_tag(content=made["style"])
        opened.add_script_tag(content=made["script"])
        opened.errors = errors
        yield opened
        browser.close()
