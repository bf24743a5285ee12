"""Takes the README's picture of the live page, in Chromium: `python docs/page.py runs RUN`.

Without a run's name it is of the last one under the root.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

import monitor
from monitor.service import Service

_PICTURE = Path(__file__).with_name("page.png")


def main() -> None:
    """Writes the picture beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default="runs")
    parser.add_argument("run", nargs="?")
    options = parser.parse_args()
    run = options.run or monitor.read(options.root, "attempts")["run"].max()
    service = Service(options.root, port=0)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1180})
            page.goto(f"{service.url}/#/run?{urlencode({'run': run})}")
            for figure in ("loss", "score", "heads"):
                page.wait_for_selector(f'[data-figure="{figure}"] .legend li')
            page.screenshot(path=_PICTURE)
            browser.close()
    finally:
        service.close()


if __name__ == "__main__":
    main()
