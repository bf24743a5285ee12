"""What the tests of the live page do with it."""

from __future__ import annotations

import dataclasses
import urllib.parse

from playwright.sync_api import expect


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


def losses_of(one):
    """A measurement without all else."""
    kept = tuple(each for each in one.readings if each.spec.name == "in_context")
    return dataclasses.replace(one, readings=kept)
