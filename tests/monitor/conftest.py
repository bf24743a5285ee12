"""Monitors of a tiny model, for the tests of what they record."""

import pytest
import torch

from monitor.measure import Monitor
from tests.callbacks.tiny import OBSERVING, TinyLM, text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyLM()


@pytest.fixture
def start():
    """Makes monitors of the run "r" with held-out text, and closes them after the test."""
    made = []
    few = {"run": "r", "text": text(), "sequences": 4, "probes": OBSERVING}

    def start(root, **more):
        made.append(Monitor(root, **(few | more)))
        return made[-1]

    yield start
    for one in made:
        one.close()
