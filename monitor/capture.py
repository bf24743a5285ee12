"""One forward pass on one stimulus, reduced while it runs.

A torch function mode sees every call of `scaled_dot_product_attention`, whoever makes it, and hands
the queries and keys, as the softmax gets them, to `monitor.attention` to be reduced at once.

Shapes: `batch` sequences of `position` token ids; `prediction` one position less.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from monitor.anatomy import LanguageModel, layer_numbers
from monitor.attention import LayerAttention, SelfAttention
from monitor.stimuli import Stimulus
from monitor.untouched import untouched

_ATTENTION = F.scaled_dot_product_attention

# Logits of this size are held at a time.
_LOGIT_BYTES = 64 * 2**20


class NoAttentionError(RuntimeError):
    """The model computed no attention that could be seen; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """What one forward pass on one stimulus showed, on the CPU.

    `attention` has one entry a layer; `losses[b, i]` is the cross-entropy in nats of token i + 1
    given tokens 0 … i. Either is None where it was not asked for.
    """

    stimulus: Stimulus
    vocab_size: int
    attention: tuple[LayerAttention, ...] | None = None
    losses: Float[Tensor, "batch prediction"] | None = None


def observe(
    model: LanguageModel,
    stimulus: Stimulus,
    *,
    attention: bool = False,
    losses: bool = False,
    attention_calls: int | None = None,
) -> Observation:
    """Runs `model` on `stimulus` and returns what was asked for.

    The batch is cut so that the logits held at a time stay small. Where `attention_calls` says how
    many attention calls one pass makes and no losses are wanted, the pass ends at the last of them.
    Raises `NoAttentionError` where attention was asked for and none was seen.
    """
    batch, positions = stimulus.tokens.shape
    at_once = max(1, _LOGIT_BYTES // (4 * positions * model.vocab_size)) if losses else batch
    stop_after = None if losses else attention_calls
    attended: list[list[LayerAttention]] = []
    lost: list[Tensor] = []
    with untouched(model.module):
        for start in range(0, batch, at_once):
            part = stimulus.rows(start, start + at_once, model.device)
            if attention:
                logits, layers = _attend(model, part, stop_after)
                attended.append(layers)
            else:
                logits = model.logits(part.tokens)
            if losses and logits is not None:
                lost.append(_losses(logits, part.tokens))
    return Observation(
        stimulus=stimulus,
        vocab_size=model.vocab_size,
        attention=tuple(map(LayerAttention.join, zip(*attended, strict=True)))
        if attention
        else None,
        losses=torch.cat(lost) if losses else None,
    )


class _SeenEnough(Exception):  # noqa: N818 -- it is no error
    """Ends a forward pass whose last attention call was seen."""


class _AttentionWatch(TorchFunctionMode):
    """Reduces every self-attention over the whole stimulus as it is computed."""

    def __init__(self, stimulus: Stimulus, path: Callable[[], str], stop_after: int | None) -> None:
        super().__init__()
        self._stimulus = stimulus
        self._path = path
        self._stop_after = stop_after
        self._thread = threading.get_ident()
        self.seen: list[tuple[str, LayerAttention]] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:
            return self._see(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # No mode sees what it calls in turn.
            F.scaled_dot_product_attention = self._see
            try:
                return func(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = _ATTENTION
        return func(*args, **kwargs)

    def _see(self, *args: Any, **kwargs: Any) -> Tensor:
        call = SelfAttention.of(self._stimulus.tokens.shape, *args, **kwargs)
        if call is None or threading.get_ident() != self._thread:
            return _ATTENTION(*args, **kwargs)
        attention, output = call.reduce(self._stimulus)
        self.seen.append((self._path(), attention))
        if len(self.seen) == self._stop_after:
            raise _SeenEnough
        return _ATTENTION(*args, **kwargs) if output is None else output


def _attend(
    model: LanguageModel, stimulus: Stimulus, stop_after: int | None
) -> tuple[Tensor | None, list[LayerAttention]]:
    with _module_path(model.module) as path, _AttentionWatch(stimulus, path, stop_after) as watch:
        try:
            logits = model.logits(stimulus.tokens)
        except _SeenEnough:
            logits = None
    if not watch.seen:
        raise NoAttentionError(_no_attention(model.module, stimulus.tokens.shape[1]))
    numbers = layer_numbers([path for path, _ in watch.seen])
    named = zip(numbers, watch.seen, strict=True)
    return logits, [attention.at(number, path) for number, (path, attention) in named]


@contextmanager
def _module_path(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Gives a function that says which submodule of `model` is running.

    The hooks are torch's global ones: the model's own are not touched, and other threads' modules
    are passed over.
    """
    names = {id(module): name for name, module in model.named_modules()}
    thread = threading.get_ident()
    running: list[str] = []

    def ours(module: nn.Module) -> bool:
        return id(module) in names and threading.get_ident() == thread

    def enter(module: nn.Module, _inputs: Any) -> None:
        if ours(module):
            running.append(names[id(module)])

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if ours(module):
            running.pop()

    entering = module_hooks.register_module_forward_pre_hook(enter)
    leaving = module_hooks.register_module_forward_hook(leave, always_call=True)
    try:
        yield lambda: running[-1] if running else ""
    finally:
        entering.remove()
        leaving.remove()


def _losses(
    logits: Float[Tensor, "batch position vocabulary"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch prediction"]:
    # One sequence at a time: the float32 copy and the log-softmax are as large as the logits.
    pairs = zip(logits, tokens, strict=True)
    rows = [F.cross_entropy(row[:-1].float(), ids[1:], reduction="none") for row, ids in pairs]
    return torch.stack(rows).cpu()


def _no_attention(model: nn.Module, positions: int) -> str:
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    here = f" (this model was built with {used!r})" if used else ""
    return (
        f"{type(model).__name__} showed no attention: in one forward pass no self-attention over "
        f"{positions} positions went through torch.nn.functional.scaled_dot_product_attention. "
        f"Hugging Face models: build them with attn_implementation='sdpa'{here}. Own modules: "
        "compute attention with that function. To go on without: probes=['in_context']."
    )
