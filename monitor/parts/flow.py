"""What flows through a model in one forward pass: tensors between its modules, into and out of its
linear maps, and through its attention.

A torch function mode sees every call of a torch function, and global module hooks know in which
module it happens. The model's own hooks are not touched.

Shapes: `batch` sequences of `position` token ids, each with `feature` numbers.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from monitor.anatomy import LanguageModel
from monitor.untouched import untouched

Kind = Literal[
    "input",
    "output",
    "linear input",
    "linear output",
    "embedding",
    "query",
    "key",
    "value",
    "mixed",
]


@dataclass(frozen=True, slots=True)
class Tap:
    """Where in a pass a tensor is: at the `number`-th such event within the module at `path`."""

    path: str
    kind: Kind
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Map:
    """The matrix [out, in] and the bias with which a linear map is computed."""

    weight: Tensor
    bias: Tensor | None


See = Callable[[Tap, Tensor, Map | None], None]


def run(
    model: LanguageModel, tokens: Int[Tensor, "batch position"], see: See
) -> Float[Tensor, "batch position vocabulary"]:
    """Runs the model and shows its tensors in the order in which they come to be; returns its
    logits. Tensors are shown as they are: what is kept must be copied.

    Raises what `see` raises, which ends the pass.
    """
    with untouched(model.module), _Flow(model.module, tokens, see).flowing():
        return model.logits(tokens)


def position_first(tensor: Tensor, tokens: Int[Tensor, "batch position"]) -> bool:
    """Whether a tensor has its position axis before its batch axis, where these differ in size."""
    return tensor.ndim > 2 and tensor.shape[:2] == tokens.shape[::-1] != tokens.shape


def rows(
    tensor: Tensor, tokens: Int[Tensor, "batch position"], *, transposed: bool
) -> Float[Tensor, "batch position feature"] | None:
    """A tensor with the same number of features for every token, in one layout; None for others.
    `transposed` says that it has its position axis first.
    """
    batch, positions = tokens.shape
    if not tensor.is_floating_point() or tensor.ndim < 2:
        return None
    if transposed:
        tensor = tensor.transpose(0, 1)
    if tensor.shape[:2] == (batch, positions):
        return tensor.flatten(2) if tensor.ndim > 2 else None
    if tensor.ndim == 4 and (tensor.shape[0], tensor.shape[2]) == (batch, positions):
        return tensor.transpose(1, 2).flatten(2)
    if tensor.shape[0] == batch * positions:
        apart: Tensor = tensor.unflatten(0, (batch, positions))
        return apart.flatten(2)
    return None


_LINEAR, _ATTENTION = F.linear, F.scaled_dot_product_attention
_MATMULS = {
    torch.matmul,
    torch.bmm,
    torch.mm,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.mm,
    Tensor.__matmul__,
}
_BADDBMMS = {torch.baddbmm, Tensor.baddbmm}
_ADDMMS = {torch.addmm, Tensor.addmm}
# What torch's own multi-head attention calls, unseen by any mode.
_INSIDE = ((F, "linear"), (F, "scaled_dot_product_attention"), (torch, "bmm"), (torch, "baddbmm"))


class _Flow(TorchFunctionMode):
    def __init__(self, model: nn.Module, tokens: Tensor, see: See) -> None:
        super().__init__()
        self._model = model
        self._tokens = tokens
        self._show = see
        self._names = {id(module): name for name, module in model.named_modules()}
        self._thread = threading.get_ident()
        self._running: list[tuple[str, int]] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._inside = False
        self._scored: tuple[Tensor, Tensor] | None = None

    @contextmanager
    def flowing(self) -> Iterator[None]:
        hooks = []
        try:
            # Not torch's global hooks: it never forgets that there was one that takes keywords.
            for module in self._model.modules():
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                )
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self._seeing_inside():
                return func(*args, **kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        if func is _LINEAR:
            given, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
            self._linear(given, weight, bias, output)
        elif func in _ADDMMS:
            bias, given, weight = _arguments(("input", "mat1", "mat2"), args, kwargs)
            self._linear(given, weight.transpose(-1, -2), bias, output)
        elif func is _ATTENTION:
            query, key, value = _arguments(("query", "key", "value"), args, kwargs)
            self._attention(query, key, value, output)
        elif getattr(func, "__name__", None) == "flex_attention":
            # The operator behind it, which returns other things beside the mixed values.
            query, key, value = args[:3]
            self._attention(query, key, value, output[0])
        elif func in _MATMULS:
            factors = [*args, *kwargs.values()]
            self._product(factors[0], factors[1], output)
        elif func in _BADDBMMS:
            _, left, right = _arguments(("input", "batch1", "batch2"), args, kwargs)
            self._product(left, right, output)
        elif func is F.embedding:
            ids, weight = _arguments(("input", "weight"), args, kwargs)
            if ids.shape == self._tokens.shape and torch.equal(ids, self._tokens):
                self._see("embedding", output, Map(weight=weight, bias=None))
        return output

    @contextmanager
    def _seeing_inside(self) -> Iterator[None]:
        before = [(place, name, getattr(place, name)) for place, name in _INSIDE]

        def seen(func: Any) -> Any:
            return lambda *args, **kwargs: self._call(func, args, kwargs)

        for place, name, func in before:
            setattr(place, name, seen(func))
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            for place, name, func in before:
                setattr(place, name, func)

    def _linear(self, given: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        if self._inside and given.ndim == 2:
            # Torch's multi-head attention flattens positions before batch.
            given, output = (t.unflatten(0, self._tokens.shape[::-1]) for t in (given, output))
        if weight.ndim == 2 and given.numel() == self._tokens.numel() * weight.shape[1]:
            self._see("linear input", given)
            self._see("linear output", output, Map(weight=weight, bias=bias))

    def _product(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """A product of matrices is a linear map, or one of the two that make attention."""
        positions = self._tokens.shape[1]
        square = (positions, positions)
        if right.ndim == 2:
            self._linear(left, right.transpose(0, 1), None, output)
        elif left.shape[-2:] == square and self._scored is not None and _weighs(left):
            self._attention(*self._scored, right, output)
            self._scored = None
        elif output.shape[-2:] == square:
            self._scored = left.clone(), right.transpose(-1, -2).clone()

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        batch, positions = self._tokens.shape
        tensors = (query, key, value, output)
        if any(t.shape[-2] != positions or t.ndim not in {3, 4} for t in tensors):
            return
        if any(t.shape[0] % batch for t in tensors):
            return
        # Those who flatten batch and head into one axis keep the batch outermost.
        apart = [t if t.ndim == 4 else t.unflatten(0, (batch, -1)) for t in tensors]
        kinds: tuple[Kind, ...] = ("query", "key", "value", "mixed")
        for kind, tensor in zip(kinds, apart, strict=True):
            self._see(kind, tensor)

    def _see(self, kind: Kind, tensor: Tensor, linear: Map | None = None) -> None:
        path, _ = self._running[-1] if self._running else ("", 0)
        number = self._counts[path, kind]
        self._counts[path, kind] += 1
        self._show(Tap(path, kind, number), tensor, linear)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        path = self._names[id(module)]
        number = self._counts[path, "entered"]
        self._counts[path, "entered"] += 1
        self._running.append((path, number))
        if (given := _first(inputs)) is not None:
            self._show(Tap(path, "input", number), given, None)

    def _leave(self, _module: nn.Module, inputs: Any, *keywords_and_output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        path, number = self._running.pop()
        # Where the module raised, torch leaves the keywords out.
        if len(keywords_and_output) == 1 or keywords_and_output[1] is None:
            return
        keywords, output = keywords_and_output
        if _first(inputs) is None and (given := _first(tuple(keywords.values()))) is not None:
            self._show(Tap(path, "input", number), given, None)
        if (given := _first(output)) is not None:
            self._show(Tap(path, "output", number), given, None)


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _first(values: Any) -> Tensor | None:
    """The first tensor of a module's arguments, or of what it returned."""
    several = values if isinstance(values, tuple | list) else (values,)
    first: Tensor | None = next((value for value in several if isinstance(value, Tensor)), None)
    return first if first is not None and first.is_floating_point() else None


def _weighs(matrix: Tensor) -> bool:
    """Whether every row is non-negative and sums to one, or to less where a sink takes the rest."""
    return bool((matrix >= 0).all()) and bool((matrix.sum(-1) < 1.01).all())
