"""Several processes that train one model measure it together: the tables are those of one process,
the first writes alone, what raises on one of them stops nobody, and training is left as it was.

Each number of processes is started once, and goes through all scenarios in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim

import monitor
from monitor.adapters import ModuleAdapter
from monitor.attention import Pattern
from monitor.measure import Monitor
from monitor.ranks import Ranks, is_sharded
from tests.callbacks.tiny import OBSERVING
from tests.models import AttentionBlock, AttentionOnly
from tests.processes import came_through, run

STEPS = 3
# Neither two nor three processes can cut it evenly.
SEQUENCES = 5


def built() -> AttentionOnly:
    torch.manual_seed(0)
    return AttentionOnly(layers=2)


def text(seed: int) -> torch.Tensor:
    return torch.randint(64, (SEQUENCES, 64), generator=torch.Generator().manual_seed(seed))


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model) if dist.get_world_size() > 1 else model


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def train(model: nn.Module, watch: Monitor | None) -> list[list[float]]:
    """The same training on every process, measured at every step; its weights at the end."""
    optimizer = optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        if watch is not None:
            watch.measure(model, step=step, tokens=step * 100)
        tokens = torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(step))
        loss = model(tokens).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [value.detach().flatten().tolist() for value in whole]


def measured(root: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    rank = dist.get_rank()
    model = wrap(built())
    # Each process would name another run, and has other text at hand.
    with Monitor(root, text=text(rank), sequences=SEQUENCES, metrics_port=0) as watch:
        weights = train(model, watch)
        served = watch.url is not None
    unwatched = train(wrap(built()), None)
    runs = [None] * dist.get_world_size()
    dist.all_gather_object(runs, watch.run)
    assert len(set(runs)) == 1
    assert served == (rank == 0)
    assert weights == unwatched


def ddp(root: Path) -> None:
    measured(root, distributed)


def fsdp(root: Path) -> None:
    measured(root, fully_sharded)


def fails_on(rank: int) -> ModuleAdapter:
    """An adapter that raises from the second measurement on, for a while, on one process."""
    calls = []

    def read(module, args, kwargs, output):
        calls.append(module)
        # Of two layers: one trial, one measurement, and then.
        if len(calls) in {5, 6} and dist.get_rank() == rank:
            raise KeyError("lost on one process")
        batch, positions = args[0].shape[:2]
        return Pattern(weights=torch.eye(positions).expand(batch, 4, -1, -1))

    return read


def fails_at_first(root: Path) -> None:
    failing(root, distributed, 0)


def fails_elsewhere(root: Path) -> None:
    failing(root, distributed, dist.get_world_size() - 1)


def fails_sharded(root: Path) -> None:
    failing(root, fully_sharded, dist.get_world_size() - 1)


def failing(root: Path, wrap: Callable[[nn.Module], nn.Module], rank: int) -> None:
    model = wrap(built())
    adapters = {AttentionBlock: fails_on(rank)}
    few = {"sequences": SEQUENCES, "probes": OBSERVING}
    with Monitor(root, run="r", adapters=adapters, **few) as watch:
        found = [watch.measure(model, step=step) for step in range(5)]
    if dist.get_rank() == 0:
        failures = [[failure.part for failure in each.failures] for each in found]
        # Both probes read the stimulus on which it was lost.
        assert ["induction", "in_context"] in failures
        assert failures[0] == failures[-1] == []
        where = f"on process {rank} of {dist.get_world_size()}"
        texts = [f.error + f.traceback for each in found for f in each.failures]
        assert all("KeyError" in t and "lost on one process" in t and where in t for t in texts)
    else:
        assert all(not each.readings and not each.failures for each in found)


def refused(root: Path) -> None:
    """Whatever one process cannot accept, all raise."""
    unwritable = root / "file"
    if dist.get_rank() == 0:
        unwritable.write_text("in the way")
    with pytest.raises(OSError, match="cannot be written"):
        Monitor(unwritable, run="r")
    with pytest.raises(ValueError, match="run name"):
        Monitor(root, run="no/run" if dist.get_rank() == 0 else "r")
    watch = Monitor(root, run="r", context=512 if dist.get_rank() == 0 else 64)
    with pytest.raises(ValueError, match="context=512"):
        watch.prepare(built(), step=0)


def tensor_parallel(root: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = built()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"unembedding": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"tensor parallelism.*DDP"):
        Monitor(root, run="r").prepare(model, step=0)


SCENARIOS = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fails at first": fails_at_first,
    "fails elsewhere": fails_elsewhere,
    "fails sharded": fails_sharded,
    "refused": refused,
    "tensor parallel": tensor_parallel,
}


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def several(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    run(SCENARIOS, request.param, folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    with Monitor(root, run="alone", text=text(0), sequences=SEQUENCES) as watch:
        train(built(), watch)
    return root


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_process_comes_through(several, name):
    assert came_through(several, name) == {"yes"}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_tables_are_those_of_one_process(several, alone, name):
    for table in ("induction", "in_context"):
        together, expected = monitor.read(several / name, table), monitor.read(alone, table)
        assert len(together) == len(expected) > 0
        assert together["validity"].eq("ok").all()
        numbers = expected.select_dtypes("number").columns.drop("attempt")
        difference = (together[numbers] - expected[numbers]).abs().max()
        assert difference.max() <= 1e-6
    curve = [
        monitor.read(root, "in_context")["loss_by_position"] for root in (several / name, alone)
    ]
    for one, other in zip(*curve, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-6, rtol=1e-6)


def test_one_process_writes(several):
    attempts = monitor.read(several / "ddp", "attempts")
    assert len(attempts) == 1
    assert attempts["measurements"].tolist() == [STEPS]
    runs = list((several / "ddp" / "induction").iterdir())
    assert len(runs) == 1
    assert len(list(runs[0].iterdir())) == STEPS


def test_what_failed_is_recorded(several):
    for name in ("fails at first", "fails elsewhere", "fails sharded"):
        failures = monitor.read(several / name, "failures")
        failed = set(failures["step"])
        assert failed
        assert set(monitor.read(several / name, "induction")["step"]) == set(range(5)) - failed


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 5, 6, 16])
def test_every_sequence_is_read_and_all_read_equally_many(batch, count):
    parts = [Ranks(rank=rank, count=count).rows(batch) for rank in range(count)]
    assert {i for start, stop in parts for i in range(start, stop)} == set(range(batch))
    assert len({stop - start for start, stop in parts}) == 1
    assert parts == sorted(parts)


def test_a_process_alone_needs_nobody():
    here = Ranks.here()
    assert here.first
    assert here.share(lambda: 3) == here.agree(lambda: 3) == 3
    assert here.gather("seen") == ["seen"]
    with pytest.raises(KeyError):
        here.agree(lambda: {}["nothing"])


class FullyShardedDataParallel(AttentionOnly):
    """Named as torch's first way of sharding."""


def test_other_ways_of_dividing_weights_are_refused():
    assert not is_sharded(built())
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel; shard it with .*fully_shard"):
        is_sharded(FullyShardedDataParallel())
    divided = built()
    divided.unembedding.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"ZeRO stage 3.*load one in a single process"):
        is_sharded(divided)
