"""Several processes ablate heads together: each its sequences, with the means of all; the first one
decides what there is time for, and what raises on one of them stops nobody.
"""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from monitor.measure import Monitor
from tests.models import PlantedCircuit
from tests.processes import came_through, first_decides, keep_on_the_first, run

# Neither two nor three processes can cut it evenly.
SEQUENCES = 5
TEXT = torch.randint(40, (SEQUENCES, 24), generator=torch.Generator().manual_seed(1))


def watching() -> Monitor:
    return Monitor(None, probes=["ablation"], text=TEXT, sequences=SEQUENCES)


def together(root: Path) -> None:
    model = nn.parallel.DistributedDataParallel(PlantedCircuit())
    before = [p.tolist() for p in model.parameters()]
    with watching() as watch:
        measurement = watch.measure(model, step=0, seconds=math.inf)
    assert measurement.failures == ()
    assert [p.tolist() for p in model.parameters()] == before
    keep_on_the_first(measurement, "ablation", root)


def timed(root: Path) -> None:
    with watching() as watch:
        first_decides(watch, PlantedCircuit())


def failing(root: Path) -> None:
    """On the last process, in the middle of the ablations."""
    model = PlantedCircuit()
    rank, count = dist.get_rank(), dist.get_world_size()
    with watching() as watch:
        # Its parts, without neurons, are looked for no more after some measurements.
        for step in range(4):
            watch.measure(model, step, seconds=0.0)
        if rank == count - 1:
            # Three passes to observe it, three for the means, and then one ablation.
            model.blocks[1].register_forward_hook(_breaking_at(9))
        measurement = watch.measure(model, step=4, seconds=math.inf)
        if rank == 0:
            (failure,) = measurement.failures
            assert failure.part == "ablation"
            assert "planted in the model" in failure.error
        else:
            assert measurement.failures == ()
        again = watch.measure(model, step=5, seconds=math.inf)
        assert len(again.readings) == (rank == 0)
        assert again.failures == ()


def _breaking_at(number: int):
    calls: list[None] = []

    def count(*_):
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("planted in the model")

    return count


SCENARIOS = {"together": together, "timed": timed, "failing": failing}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda count: f"{count} processes")
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    run(SCENARIOS, request.param, folder)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_process_comes_through(folder, name):
    assert came_through(folder, name) == {"yes"}


def test_the_table_is_that_of_one_process(folder):
    with watching() as watch:
        expected = watch.measure(PlantedCircuit(), step=0, seconds=math.inf).frame("ablation")
    stored = pd.read_pickle(folder / "together" / "table.pickle")
    numbers = expected.select_dtypes("number").columns
    same = [name for name in expected if name not in {*numbers, "time"}]
    pd.testing.assert_frame_equal(stored[same], expected[same])
    pd.testing.assert_frame_equal(stored[numbers], expected[numbers], atol=2e-5)
