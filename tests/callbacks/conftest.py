"""Trainings of a tiny model with callbacks that watch them, under both packages of Lightning."""

import functools

import pytest

from callbacks import TrainingDynamics
from tests.callbacks.tiny import OBSERVING, PACKAGES, train_tiny


@pytest.fixture(params=PACKAGES, scope="module")
def package(request):
    return request.param


@pytest.fixture
def root(tmp_path):
    """Where the callbacks of `dynamics` write."""
    return tmp_path / "runs"


@pytest.fixture
def dynamics(root):
    """Makes callbacks that measure few sequences, however long that takes; metrics, and probes that
    do more than to observe one pass, only where asked for.
    """

    def dynamics(**more):
        few = {"metrics_port": None, "sequences": 4, "root": root, "overhead": None}
        few["probes"] = OBSERVING
        return TrainingDynamics(**(few | more))

    return dynamics


@pytest.fixture
def fit(package, tmp_path):
    """`train_tiny` with this package: callbacks, and what else should differ."""
    return functools.partial(train_tiny, package, tmp_path)
