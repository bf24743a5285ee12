"""Runs scenarios in several processes that train together, each scenario on all of them."""

from __future__ import annotations

import json
import logging
import math
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from monitor.measure import Monitor
from monitor.record import Measurement

Scenario = Callable[[Path], None]


def run(scenarios: Mapping[str, Scenario], count: int, folder: Path) -> None:
    """Starts `count` processes, which go through all scenarios in turn, each with a folder."""
    torch.multiprocessing.spawn(_process, (count, folder, scenarios), nprocs=count)


def came_through(folder: Path, name: str) -> set[str]:
    """What came of a scenario on the processes: `{"yes"}` where it went well on all."""
    written = [json.loads(path.read_text()) for path in folder.glob("came-through-*.json")]
    assert len(written) >= 2
    return {each.get(name, "not reached") for each in written}


def keep_on_the_first(measurement: Measurement, table: str, root: Path) -> None:
    """Keeps a table of the first process, which alone has any."""
    if dist.get_rank() == 0:
        measurement.frame(table).to_pickle(root / "table.pickle")
    else:
        assert measurement.readings == ()


def first_decides(watch: Monitor, model: nn.Module) -> None:
    """What there is time for, whatever the others would allow."""
    first = dist.get_rank() == 0
    assert watch.measure(model, step=0, seconds=0.0 if first else math.inf).readings == ()
    made = watch.measure(model, step=1, seconds=1e6 if first else 0.0)
    assert len(made.readings) == first
    assert made.failures == ()


def meet(place: Path, rank: int, count: int) -> None:
    """Makes the processes that come to the same place train together."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{place}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )


def _process(rank: int, count: int, folder: Path, scenarios: Mapping[str, Scenario]) -> None:
    torch.set_num_threads(1)
    logging.disable()
    meet(folder / "meeting", rank, count)
    came = {}
    for name, scenario in scenarios.items():
        root = folder / name
        root.mkdir(exist_ok=True)
        try:
            dist.barrier()
            scenario(root)
            came[name] = "yes"
        except BaseException:
            came[name] = traceback.format_exc()
            # The others wait for this one in vain, and raise in turn.
            break
    (folder / f"came-through-{rank}.json").write_text(json.dumps(came))
    dist.destroy_process_group()
