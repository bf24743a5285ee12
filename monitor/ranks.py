"""The processes that train one model together, and how what they measured comes together.

Every process reads a part of each stimulus; what it saw, small and on the CPU, is gathered by the
first, which alone computes, writes and serves.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from monitor.untouched import is_fully_sharded

_log = logging.getLogger("phasewatch")

Result = TypeVar("Result")

# How long the others are waited for: less than training waits for a process that waits here.
PATIENCE = timedelta(minutes=5)
_SECONDS_BEFORE_SAYING_SO = 20

_EXPECTED = (
    "Expected each process to hold the whole model (DDP) or fully_shard alone; else "
    "measure its checkpoints: load one in a single process and call measure(model)"
)


class LostError(RuntimeError):
    """The other processes could not be reached, or were not where this one was."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ranks:
    """This process among those that train together; `group` is None where it is alone.

    What fails on one of them must not let the others wait: every method is called by all of them in
    the same order, and raises on all of them or on none. Once they lost each other every method
    raises `LostError` at once.
    """

    rank: int = 0
    count: int = 1
    group: Any = None
    lost: str = ""

    @classmethod
    def here(cls) -> Ranks:
        """The processes of torch.distributed, where it is initialised; to be called on all of them.

        They get a group of their own: what is measured travels on the CPU, whatever training uses.
        Raises `LostError` where the others do not come.
        """
        count = _processes()
        if count == 1:
            return cls()
        waiting = threading.Timer(
            _SECONDS_BEFORE_SAYING_SO,
            _log.warning,
            ["waiting for all %d processes: make a Monitor, and call it, on each of them", count],
        )
        waiting.daemon = True
        waiting.start()
        try:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        except RuntimeError as error:
            raise LostError(
                f"{count} processes train together, but not all of them made a Monitor within "
                f"{PATIENCE.total_seconds():.0f} s ({error}): make one, and call it at the same "
                "steps, on each of them; the first one writes"
            ) from error
        finally:
            waiting.cancel()
        return cls(rank=dist.get_rank(), count=count, group=group)

    @property
    def first(self) -> bool:
        """Whether this is the process that computes, writes and serves."""
        return self.rank == 0

    @property
    def current(self) -> bool:
        """Whether these still are all processes: torch.distributed may be initialised later."""
        return self.count == _processes()

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
        outcome = [_packed(_outcome(decide)) if self.first else None]
        with self._exchange():
            dist.broadcast_object_list(outcome, group=self.group, src=0)
        value, error = _unpacked(outcome[0])
        if error is not None:
            raise error
        result: Result = value
        return result

    def agree(self, work: Callable[[], Result], *, at: int | None = None) -> Result:
        """What `work` returns on this process; where it raises on any of them, it raises on all.

        Raises `LostError` where they did not all come with the same `at`.
        """
        if self.group is None:
            return work()
        value, mine = _outcome(work)
        packed: list[Any] = [None] * self.count
        with self._exchange():
            dist.all_gather_object(packed, _packed((at, mine)), group=self.group)
        others = [_unpacked(each) for each in packed]
        if len({place for place, _ in others}) > 1:
            raise LostError(
                f"the processes are at different steps, {[place for place, _ in others]}: "
                "measure on all of them at the same"
            )
        # The same error everywhere, so that all take the same way from here.
        for rank, (_, error) in enumerate(others):
            if error is not None:
                raise mine if rank == self.rank and mine is not None else error
        result: Result = value  # type: ignore[assignment]  # None only where it raised
        return result

    def gather(self, value: Result) -> list[Result]:
        """Every process's value, in their order, on the first process; elsewhere nothing."""
        if self.group is None:
            return [value]
        packed: list[Any] | None = [None] * self.count if self.first else None
        with self._exchange():
            dist.gather_object(_packed(value), packed, dst=0, group=self.group)
        return [_unpacked(each) for each in packed or ()]

    def close(self) -> None:
        """Lets go of the group; waits for nobody."""
        # Training may have ended its own groups, and this one with them.
        with contextlib.suppress(Exception):
            if self.group is not None:
                dist.destroy_process_group(self.group)
        self.lost = self.lost or "the monitor was closed"

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        if self.lost:
            raise LostError(self.lost)
        try:
            yield
        except Exception as error:
            self.lost = (
                f"process {self.rank} of {self.count} does not reach the others "
                f"({type(error).__name__}: {error}). Expected all of them to measure at the same "
                "steps; nothing more is measured"
            )
            raise LostError(self.lost) from error


def portable(error: Exception) -> Exception:
    """The error where it can travel between processes, else one that says the same; with its
    traceback as a note.
    """
    note = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 -- what was dumped just now
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def check_alike(model: nn.Module, ranks: Ranks) -> None:
    """Raises `ValueError`, on every process, where they do not hold the same model, or hold it
    divided in a way that cannot be measured.
    """
    ranks.agree(lambda: isinstance(model, nn.Module) and is_sharded(model))
    if ranks.group is None:
        return
    found = ranks.gather(_Likeness.of(model))

    def compare() -> None:
        for rank, (first, other) in enumerate(itertools.product(found[:1], found)):
            difference = first.difference(other)
            if difference is not None:
                raise ValueError(f"process {rank} of {ranks.count} {difference}. {_EXPECTED}")

    ranks.share(compare)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Likeness:
    """What of a model must be the same on all processes.

    `sample` holds some of the weights: all differ where nobody made them equal.
    """

    name: str
    shapes: Sequence[tuple[str, tuple[int, ...]]]
    sample: np.ndarray[Any, Any]

    @classmethod
    def of(cls, model: Any) -> _Likeness:
        named = list(model.named_parameters()) if isinstance(model, nn.Module) else []
        whole = [
            weight.detach().reshape(-1)[:8].float().cpu()
            for _, weight in named
            if weight.numel() and not hasattr(weight, "placements") and not weight.is_meta
        ]
        return cls(
            name=type(model).__name__,
            shapes=[(name, tuple(weight.shape)) for name, weight in named],
            sample=torch.cat(whole).numpy() if whole else np.empty(0),
        )

    def difference(self, other: _Likeness) -> str | None:
        """What is different in another one, or None."""
        if (self.name, self.shapes) != (other.name, other.shapes):
            return (
                f"holds a {other.name} with {len(other.shapes)} parameters, and the first one a "
                f"{self.name} with {len(self.shapes)}, or of other shapes: stages of a pipeline "
                "cannot be measured"
            )
        # Equal up to what rounding may have done to each of them.
        if len(self.sample) == len(other.sample) and not np.allclose(
            self.sample, other.sample, rtol=0.01, atol=1e-6, equal_nan=True
        ):
            return (
                "has other weights than the first one: a model of its own, or a part of each layer "
                "(tensor parallelism). Models that train together are the same once wrapped: make "
                "the first measurement after that"
            )
        return None


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
    fully = any(map(is_fully_sharded, modules))
    if shards and (not fully or max(shards) > 1):
        how = "within its layers (tensor parallelism)"
    if how is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be measured while its weights are divided {how}. "
            f"{_EXPECTED}"
        )
    # Between passes they may be gathered.
    return fully


def _processes() -> int:
    together = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def _outcome(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, portable(error)


class _Pickler(pickle.Pickler):
    """Takes tensors as arrays: torch's own way takes ten times as long for small ones."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            # NumPy has no bfloat16, among others.
            with contextlib.suppress(TypeError, RuntimeError):
                return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _unpacked(packed: Any) -> Any:
    return pickle.loads(packed)  # noqa: S301 -- from a process of the same training
