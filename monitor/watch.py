"""Watching a forward pass: what attends in it, and where its logits come from.

A torch function mode sees every call of a torch function, whoever makes it, and hooks, which are
gone afterwards, know whose it is.

Shapes: `batch` sequences of `position` token ids; `prediction` one position less.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monitor.adapters import read_module, recognised, scaled_dot_product, softmax
from monitor.anatomy import LanguageModel, covers
from monitor.attention import AttentionCall, LayerAttention
from monitor.stimuli import Stimulus

# Logits of this size are held at a time.
_LOGIT_BYTES = 32 * 2**20


class SeenEnough(Exception):  # noqa: N818 -- it is no error
    """Ends a forward pass of which everything wanted was seen."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """What to see of a forward pass.

    `stop_after` attention calls nothing more needs to be computed (None: to the end). `together`:
    other processes run the same pass and wait for this one, which is then never ended early.
    """

    attention: bool
    losses: bool
    stop_after: int | None
    together: bool


class Watch(TorchFunctionMode):
    """Reduces what is wanted while a model runs on a stimulus."""

    def __init__(self, model: LanguageModel, stimulus: Stimulus, wanted: Wanted) -> None:
        super().__init__()
        self._model = model
        self._stimulus = stimulus
        self._wanted = wanted
        self._thread = threading.get_ident()
        self._running = _Running(model.module)
        self._as_wide_calls = 0
        self.seen: list[tuple[str, LayerAttention]] = []
        self.losses: Float[Tensor, "batch prediction"] | None = None
        self.error: Exception | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the model computes is seen."""
        kinds = tuple(self._model.adapters) if self._wanted.attention else ()
        with self._running.followed(kinds, self._read_module), self:
            yield

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        if self._wanted.losses and func is F.linear and self._is_unembedding(*args, **kwargs):
            return self._unembed(*args, **kwargs)
        if not self._wanted.attention:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self._seeing_inside():
                return func(*args, **kwargs)
        return self._attend(func, *args, **kwargs)

    def _attend(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """What a function returns, and where it is attention, that seen."""
        if self._running.adapted:
            return func(*args, **kwargs)
        output = self._take(lambda shape: recognised(func, args, kwargs, shape))
        return func(*args, **kwargs) if output is None else output

    def _read_module(self, *called: Any) -> None:
        """Sees the attention of a module that a user's adapter reads."""
        self._take(lambda shape: read_module(self._model.adapters, shape, *called))

    def _take(self, read: Callable[[torch.Size], AttentionCall | None]) -> Any:
        """Reduces one computation of attention; returns its output where that is known."""
        try:
            call = read(self._stimulus.tokens.shape)
            if call is None:
                return None
            attention, output = call.reduce(self._stimulus)
        except Exception as error:
            if not self._wanted.together:
                raise
            self.error = error
            return None
        self.seen.append((self._running.path, attention))
        if len(self.seen) == self._wanted.stop_after and not self._wanted.together:
            raise SeenEnough
        return output

    def _is_unembedding(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:  # noqa: ARG002 -- the arguments of a linear layer
        if len(weight) == self._model.width and covers(self._stimulus.tokens, hidden):
            self._as_wide_calls += 1
            return self._as_wide_calls == self._model.unembedding_call
        return False

    def _unembed(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The losses from a chunk of logits at a time, and nothing for the model to go on with."""
        tokens = self._stimulus.tokens
        hidden = hidden.view(*tokens.shape, -1)[:, :-1].flatten(0, 1)
        rows = max(1, _LOGIT_BYTES // (4 * len(weight)))
        chunks = zip(hidden.split(rows), tokens[:, 1:].flatten().split(rows), strict=True)
        losses = [
            F.cross_entropy(F.linear(some, weight, bias).float(), targets, reduction="none")
            for some, targets in chunks
        ]
        self.losses = torch.cat(losses).view(len(tokens), -1).cpu()
        if not self._wanted.together:
            raise SeenEnough
        # Nobody reads these logits.
        return hidden.new_zeros(()).expand(*tokens.shape, len(weight))

    @contextmanager
    def _seeing_inside(self) -> Iterator[None]:
        """A mode does not see what torch's own multi-head attention calls in turn."""
        F.scaled_dot_product_attention = functools.partial(
            self._attend, scaled_dot_product.FUNCTION
        )
        F.softmax = functools.partial(self._attend, softmax.FUNCTION)
        try:
            yield
        finally:
            F.scaled_dot_product_attention = scaled_dot_product.FUNCTION
            F.softmax = softmax.FUNCTION


# Takes a module, the arguments and keyword arguments of its forward, and what that returned.
_Read = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@dataclass(slots=True, eq=False)
class _Running:
    """The submodules of a model that are running, outermost first."""

    model: nn.Module
    stack: list[tuple[str, nn.Module]] = field(default_factory=list)
    # How many of them are read as a whole.
    adapted: int = 0

    @property
    def path(self) -> str:
        """The innermost running module's."""
        return self.stack[-1][0] if self.stack else ""

    @contextmanager
    def followed(self, kinds: tuple[type[nn.Module], ...], read: _Read) -> Iterator[None]:
        """Inside, modules are followed, and those of certain kinds are read when they have run."""
        thread = threading.get_ident()

        def enter(name: str, module: nn.Module, _inputs: Any) -> None:
            if threading.get_ident() == thread:
                self.stack.append((name, module))
                self.adapted += isinstance(module, kinds)

        def ran(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Of such modules within each other the outermost is read.
            if threading.get_ident() == thread and self.adapted == 1:
                read(module, args, kwargs, output)

        def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if threading.get_ident() == thread:
                self.stack.pop()
                self.adapted -= isinstance(module, kinds)

        # Hooks on every module and not torch's global ones, of which compiled blocks warn.
        hooks = []
        try:
            for name, module in self.model.named_modules():
                hooks.append(module.register_forward_pre_hook(functools.partial(enter, name)))
                if isinstance(module, kinds):
                    hooks.append(module.register_forward_hook(ran, with_kwargs=True))
                hooks.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
