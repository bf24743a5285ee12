"""Several processes walk together: each makes some of the walks, and the table is that of one."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from monitor.measure import Monitor
from tests.callbacks.tiny import TinyLM, text
from tests.processes import came_through, first_decides, keep_on_the_first, run


def built() -> nn.Module:
    torch.manual_seed(0)
    return TinyLM()


def watching() -> Monitor:
    return Monitor(None, probes=["learning_coefficient"], text=text(5))


def together(root: Path) -> None:
    model = nn.parallel.DistributedDataParallel(built())
    with watching() as watch:
        measurement = watch.measure(model, step=0, seconds=math.inf)
    assert measurement.failures == ()
    assert all(p.grad is None for p in model.parameters())
    keep_on_the_first(measurement, "learning_coefficient", root)


def timed(root: Path) -> None:
    with watching() as watch:
        first_decides(watch, built())


def failing(root: Path) -> None:
    """On the last process, in the middle of its walks."""
    model = built()
    rank, count = dist.get_rank(), dist.get_world_size()
    with watching() as watch:
        watch.prepare(model, 0)
        if rank == count - 1:
            left = [False, *[True] * 50]
            hook = model.register_forward_pre_hook(lambda *_: _break_at_last(left))
        measurement = watch.measure(model, step=0, seconds=math.inf)
        if rank == count - 1:
            hook.remove()
        else:
            assert len(measurement.failures) == (rank == 0)
        if rank == 0:
            (failure,) = measurement.failures
            assert "planted in the model" in failure.error
        again = watch.measure(model, step=1, seconds=math.inf)
        assert len(again.readings) == (rank == 0)
        assert again.failures == ()


def _break_at_last(left: list[bool]) -> None:
    if not left.pop():
        raise RuntimeError("planted in the model")


SCENARIOS = {"together": together, "timed": timed, "failing": failing}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda count: f"{count} processes")
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("walking")
    run(SCENARIOS, request.param, folder)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_process_comes_through(folder, name):
    assert came_through(folder, name) == {"yes"}


def test_the_table_is_that_of_one_process(folder):
    with watching() as watch:
        expected = watch.measure(built(), step=0, seconds=math.inf).frame("learning_coefficient")
    stored = pd.read_pickle(folder / "together" / "table.pickle")
    pd.testing.assert_frame_equal(stored.drop(columns="time"), expected.drop(columns="time"))
