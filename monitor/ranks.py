"""The processes that train one model together, and how what they measured comes together.

Every process reads a part of each stimulus; what it saw, small and on the CPU, is gathered by the
first, which alone computes, writes and serves.
"""

from __future__ import annotations

import operator
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranks:
    """This process among those that train together; `group` is None where it is alone."""

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def here(cls) -> Ranks:
        """The processes of torch.distributed, where it is initialised; to be called on all of them.

        They get a group of their own: what is measured travels on the CPU, whatever training uses.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        group = dist.new_group(backend="gloo")
        return cls(rank=dist.get_rank(), count=dist.get_world_size(), group=group)

    @property
    def first(self) -> bool:
        """Whether this is the process that computes, writes and serves."""
        return self.rank == 0

    def rows(self, batch: int) -> tuple[int, int]:
        """The sequences of a batch that this process reads, from the first up to the second.

        All read equally many, and where the batch cannot be cut evenly some are read twice: where
        weights are sharded, every process has to make the same forward passes.
        """
        size = -(-batch // self.count)
        start = min(self.rank * size, batch - size)
        return start, start + size

    def share(self, decide: Callable[[], Result]) -> Result:
        """What `decide` returns, or raises, on the first process; it runs on no other."""
        if self.group is None:
            return decide()
        outcome: list[Any] = [_outcome(decide) if self.first else None]
        dist.broadcast_object_list(outcome, group=self.group, src=0)
        value: Result = _value(outcome[0])
        return value

    def agree(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on this process; where it raises on any of them, it raises on all."""
        if self.group is None:
            return work()
        mine = _outcome(work)
        errors: list[Any] = [None] * self.count
        dist.all_gather_object(errors, mine[1], group=self.group)
        error = next((error for error in errors if error is not None), None)
        if error is not None:
            raise mine[1] or error
        value: Result = _value(mine)
        return value

    def gather(self, value: Result) -> list[Result]:
        """Every process's value, in their order, on the first process; elsewhere nothing."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []


def portable(error: Exception) -> Exception:
    """The error where it can travel between processes, else one that says the same; with its
    traceback as a note.
    """
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 -- what was dumped just now
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def is_sharded(model: nn.Module) -> bool:
    """Whether every process holds a part of the weights (FSDP2) and not all of them.

    Raises `ValueError` where weights are divided in a way that cannot be measured.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    how = None
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        how = "by FullyShardedDataParallel; shard it with torch.distributed.fsdp.fully_shard"
    elif any(hasattr(parameter, "ds_id") for parameter in parameters):
        how = "by DeepSpeed's ZeRO stage 3; stages 1 and 2 can be measured"
    shards = [
        sum(placement.is_shard() for placement in parameter.placements)
        for parameter in parameters
        if hasattr(parameter, "placements")
    ]
    if shards and (not any(map(_is_fully_sharded, modules)) or max(shards) > 1):
        how = "within its layers (tensor parallelism)"
    if how is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be measured while its weights are divided {how}. "
            "Expected each process to hold the whole model (DDP) or fully_shard alone; else "
            "measure its checkpoints: load one in a single process and call measure(model)"
        )
    return bool(shards)


def reshard(model: nn.Module) -> None:
    """Lets go of the weights that fully sharded modules gathered, as training left them."""
    for module in filter(_is_fully_sharded, model.modules()):
        operator.methodcaller("reshard")(module)


def _is_fully_sharded(module: Any) -> bool:
    """Whether it is an FSDPModule; importing that class would take a second."""
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, portable(error)


def _value(outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value
