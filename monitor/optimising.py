"""What optimisers do to the weights, read while they do it: gradients as they have them, and how
far each parameter goes; and those of micro-batches as they are added up. Nothing is computed again,
and nothing that training reads is written.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from monitor.divided import ONLY_A_PART, is_whole
from monitor.noise_scale import MicroBatches, NoiseScale

NOT_YET = "no update has been made yet"
UNFORESEEN = "the latest update was not read: that it is measured was not known before"
SEVERAL = "several optimisers are watched, and each has gradients of its own"
UNWATCHED = "no optimiser is watched: pass it to Monitor.watch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The latest update of one parameter: L2 norms of its gradient (None: it had none) and of how
    far it went, and the learning rate (NaN: its optimiser has none).
    """

    gradient: float | None
    change: float
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What training itself did until a measurement.

    Attributes:
        loss: of the latest step, where that is known.
        updates: by parameter its latest update.
        why: `ok`, or why none was read.
        noise: what the micro-batches of the latest update tell.
        steps_per_second: since the measurement before, the time that this one took left out.
        tokens_per_second: likewise.
    """

    loss: float | None = None
    updates: Mapping[Tensor, Update] = field(default_factory=dict)
    why: str = UNWATCHED
    noise: NoiseScale = field(default_factory=NoiseScale)
    steps_per_second: float | None = None
    tokens_per_second: float | None = None


class OptimiserWatch:
    """Reads the updates that optimisers make, where that is asked for.

    Gradients are read after the update, where they are as they were used: clipped, unscaled, and
    made by then where a closure makes them. While the update is made there is a copy of the
    weights. What fails is told by `failures`, and never raised into training.

    Args:
        optimizers: those of torch, or what wraps one as its `optimizer`.
        every: one update in so many is read, counted from now; None: those that are expected.
        clock: gives seconds.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> watch = OptimiserWatch([optimizer], every=1)
    >>> (weight**2).sum().backward()
    >>> optimizer.step()
    >>> watch.training(step=1).updates[weight]
    Update(gradient=10.0, change=5.0, learning_rate=0.5)
    >>> watch.close()

    Raises:
        ValueError: there is no optimiser, or `every` is no number of updates.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        *,
        every: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(
                f"every={every!r}; expected one update in how many is read, such as 100, or None "
                "for those that are announced"
            )
        inner = [_unwrapped(one) for one in optimizers]
        kinds = sorted({type(one).__name__ for one in inner if not isinstance(one, Optimizer)})
        if kinds or not inner:
            raise ValueError(
                f"got {', '.join(kinds) or 'no optimiser'}; expected one or more "
                "torch.optim.Optimizer"
            )
        self._clock = clock
        self._watched = [_Watched(one, every) for one in inner]
        self._since: tuple[int, int | None, float] | None = None

    def expect(self, soon: bool) -> None:
        """Whether the updates that come next are to be read, until this is called again."""
        for each in self._watched:
            each.expect(soon)

    def training(
        self, *, step: int, tokens: int | None = None, loss: float | None = None
    ) -> Training:
        """What is known at `step`, after so many `tokens`; updates are told of once."""
        steps, rate = self._rates(step, tokens)
        updates = {key: value for each in self._watched for key, value in each.take().items()}
        why = next((each.why for each in self._watched if each.why), "")
        made = any(each.updates for each in self._watched)
        several = len(self._watched) > 1
        return Training(
            loss=loss,
            updates=updates,
            noise=NoiseScale(why=SEVERAL) if several else self._watched[0].noise,
            why="ok" if updates else why or (UNFORESEEN if made else NOT_YET),
            steps_per_second=steps,
            tokens_per_second=rate,
        )

    def go_on(self, *, step: int, tokens: int | None = None) -> None:
        """From now on training goes on from `step`."""
        self._since = (step, tokens, self._clock())

    def failures(self) -> list[Exception]:
        """What failed since this was asked last."""
        failed = [each.failed for each in self._watched if each.failed is not None]
        for each in self._watched:
            each.failed = None
        return failed

    def seconds(self) -> float:
        """What reading took since this was asked last."""
        return sum(each.taken() for each in self._watched)

    def close(self) -> None:
        """Leaves the optimisers as they were."""
        for each in self._watched:
            each.close()

    def _rates(self, step: int, tokens: int | None) -> tuple[float | None, float | None]:
        """Steps and tokens a second."""
        if self._since is None:
            return None, None
        since_step, since_tokens, then = self._since
        seconds, steps = self._clock() - then, step - since_step
        if seconds <= 0 or steps <= 0:
            return None, None
        if tokens is None or since_tokens is None:
            return steps / seconds, None
        return steps / seconds, (tokens - since_tokens) / seconds


class _Watched:
    """One optimiser, and its latest update where that was to be read."""

    def __init__(self, optimizer: Optimizer, every: int | None) -> None:
        self._expected = False
        self._seconds = 0.0
        self.failed: Exception | None = None
        self.why = ""
        self._every = every
        self.updates = 0
        self._before: list[tuple[Tensor, Tensor]] = []
        self._read: dict[Tensor, tuple[Tensor | None, Tensor, float]] = {}
        self.noise = NoiseScale()
        self._optimizer, self._batches = optimizer, MicroBatches()
        self._hooks = (
            optimizer.register_step_pre_hook(_uncompiled(self._copy)),
            optimizer.register_step_post_hook(_uncompiled(self._compare)),
        )
        self._foresee()

    def expect(self, soon: bool) -> None:
        if soon != self._expected:
            self._expected = soon
            self._foresee()

    def taken(self) -> float:
        """What reading took since this was asked last."""
        seconds = self._seconds + self._batches.seconds
        self._seconds = self._batches.seconds = 0.0
        return seconds

    def take(self) -> dict[Tensor, Update]:
        """The latest update, once."""
        read, self._read = self._read, {}
        return {
            parameter: Update(
                gradient=None if gradient is None else float(gradient),
                change=float(change),
                learning_rate=rate,
            )
            for parameter, (gradient, change, rate) in read.items()
        }

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._batches.end()
        self._before, self._read = [], {}

    def _due(self, update: int) -> bool:
        """Whether an update is to be read, counted from 1."""
        return self._expected or (self._every is not None and update % self._every == 0)

    def _foresee(self) -> None:
        """Has the gradients of the next update looked at as they come, where it is to be read."""
        try:
            self._batches.end()
            if self._due(self.updates + 1):
                parameters = [p for p, _ in _trained(self._optimizer)]
                if is_whole(parameters):
                    self._batches.begin(parameters)
        except Exception as error:
            self.failed = error

    def _copy(self, optimizer: Optimizer, *_: Any) -> None:
        begun = time.perf_counter()
        self.updates += 1
        # What was read is of an earlier update from now on.
        self._before, self._read, self.why = [], {}, ""
        self.noise = NoiseScale()
        if not self._due(self.updates):
            return
        try:
            parameters = [p for p, _ in _trained(optimizer)]
            if not is_whole(parameters):
                self.why = ONLY_A_PART
                return
            self._before = [(p, p.detach().clone()) for p in parameters]
        except Exception as error:
            self._fail(error)
        self._seconds += time.perf_counter() - begun

    def _compare(self, optimizer: Optimizer, *_: Any) -> None:
        begun = time.perf_counter()
        noise = self._batches.end()
        self._foresee()
        if not self._before:
            return
        before, self._before = dict(self._before), []
        try:
            with torch.no_grad():
                for parameter, rate in _trained(optimizer):
                    gradient = parameter.grad
                    # Each copy is gone as soon as it is compared.
                    change = _wide(before.pop(parameter)).sub_(parameter.detach())
                    self._read[parameter] = (
                        None if gradient is None else _norm(gradient),
                        torch.linalg.vector_norm(change),
                        rate,
                    )
            self.noise = noise
        except Exception as error:
            self._fail(error)
        self._seconds += time.perf_counter() - begun

    def _fail(self, error: Exception) -> None:
        self._before, self._read = [], {}
        self.failed, self.why = error, f"{type(error).__name__}: {error}"


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    """As part of a compiled step it would be compiled again for every count of updates."""
    # Nothing is compiled where dynamo was never imported, and importing it takes a second.
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _unwrapped(optimizer: Any) -> Any:
    """The optimiser that makes the updates: hooks of what wraps it (accelerate's) may never run."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _trained(optimizer: Optimizer) -> list[tuple[Tensor, float]]:
    """The parameters that it updates, and their learning rates."""
    return [
        (parameter, float(group.get("lr", math.nan)))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(gradient: Tensor) -> Tensor:
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(_wide(gradient.detach()))
    return norm
