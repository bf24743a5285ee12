"""Prometheus sinks that are closed after the test."""

import pytest

from monitor.sinks import PrometheusSink


@pytest.fixture
def make():
    """Makes them, at any free port unless one is given."""
    made = []

    def make(run="r", **more):
        made.append(PrometheusSink(run, **({"port": 0} | more)))
        return made[-1]

    yield make
    for sink in made:
        sink.close()
