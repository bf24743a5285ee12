"""Metrics pages for the tests of what names metrics."""

import pytest


@pytest.fixture
def make():
    from monitor.sinks import PrometheusSink

    made = []

    def one():
        made.append(PrometheusSink("r", port=0))
        return made[-1]

    yield one
    for sink in made:
        sink.close()
