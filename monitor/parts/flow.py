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
    "pattern",
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


See = Callable[[Tap, Tensor, Map | None], Tensor | None]
"""Takes a tensor as it passes, and where that is the output of a linear map, that; returns what the
model goes on with in its place, or None.
"""


def run(
    model: LanguageModel, tokens: Int[Tensor, "batch position"], see: See
) -> Float[Tensor, "batch position vocabulary"]:
    """Runs the model and shows its tensors in the order in which they come to be; returns its
    logits. Tensors are shown as they are: what is kept must be copied. The model goes on with what
    `see` returns in the place of a tensor; queries, keys and values can be exchanged only where one
    function makes attention of them, elsewhere the `pattern` can.

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
_GIVEN: tuple[Kind, Kind, Kind] = ("query", "key", "value")
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
        if func is _LINEAR or func in _ADDMMS:
            return self._linear_call(func, args, kwargs)
        if func in _MATMULS or func in _BADDBMMS:
            return self._product_call(func, args, kwargs)
        if func is _ATTENTION or getattr(func, "__name__", None) == "flex_attention":
            return self._attend(func, args, kwargs)
        output = func(*args, **kwargs)
        if func is F.embedding:
            ids, weight = _arguments(("input", "weight"), args, kwargs)
            if ids.shape == self._tokens.shape and torch.equal(ids, self._tokens):
                return self._see("embedding", output, Map(weight=weight, bias=None))
        return output

    def _linear_call(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if func is _LINEAR:
            names = ("input", "weight", "bias")
            given, weight, bias = _arguments(names, args, kwargs)
        else:
            names = ("input", "mat1", "mat2")
            bias, given, transposed = _arguments(names, args, kwargs)
            weight = transposed.transpose(-1, -2)
        at = names.index("input" if func is _LINEAR else "mat1")
        return self._linear(given, weight, bias, _exchanging(func, names[at], at, args, kwargs))

    def _product_call(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if func in _MATMULS:
            left, right = [*args, *kwargs.values()][:2]
            return self._product(left, right, _exchanging(func, "input", 0, args, kwargs))
        _, left, right = _arguments(("input", "batch1", "batch2"), args, kwargs)
        return self._product(left, right, _exchanging(func, "batch1", 1, args, kwargs))

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

    def _linear(
        self, given: Tensor, weight: Tensor, bias: Tensor | None, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        if weight.ndim != 2 or given.numel() != self._tokens.numel() * weight.shape[1]:
            return run(given)
        # Torch's multi-head attention flattens positions before batch.
        flat = self._inside and given.ndim == 2
        read = given.unflatten(0, self._tokens.shape[::-1]) if flat else given
        output = run(self._see("linear input", read).reshape(given.shape))
        made = output.unflatten(0, self._tokens.shape[::-1]) if flat else output
        return self._see("linear output", made, Map(weight=weight, bias=bias)).reshape(output.shape)

    def _product(self, left: Tensor, right: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """A product of matrices is a linear map, or one of the two that make attention."""
        positions = self._tokens.shape[1]
        square = (positions, positions)
        if right.ndim == 2:
            return self._linear(left, right.transpose(0, 1), None, multiply)
        if left.shape[-2:] == square and self._scored is not None and _weighs(left):
            query, key = self._scored
            self._scored = None
            if (apart := self._apart(query, key, right)) is None:
                return multiply(left)
            for kind, tensor in zip(_GIVEN, apart, strict=True):
                self._see(kind, tensor)
            pattern = left if left.ndim == 4 else left.unflatten(0, (len(self._tokens), -1))
            return self._mixed(multiply(self._see("pattern", pattern).reshape(left.shape)))
        output = multiply(left)
        if output.shape[-2:] == square:
            self._scored = left.clone(), right.transpose(-1, -2).clone()
        return output

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function that makes attention of queries and keys."""
        given = _arguments(_GIVEN, args, kwargs)
        if (apart := self._apart(*given)) is None:
            return func(*args, **kwargs)
        read = [
            self._see(kind, tensor).reshape(own.shape)
            for kind, tensor, own in zip(_GIVEN, apart, given, strict=True)
        ]
        named = {k: v for k, v in kwargs.items() if k not in _GIVEN}
        output = func(*read, *args[3:], **named)
        # The operator behind flex_attention returns other things beside the mixed values.
        if isinstance(output, tuple):
            return (self._mixed(output[0]), *output[1:])
        return self._mixed(output)

    def _mixed(self, output: Tensor) -> Tensor:
        (apart,) = self._apart(output) or (output,)
        return self._see("mixed", apart).reshape(output.shape)

    def _apart(self, *tensors: Tensor) -> list[Tensor] | None:
        """Queries, keys, values or what is mixed of them as [batch head position feature]; None
        where they are not of all positions.
        """
        batch, positions = self._tokens.shape
        if any(t.ndim not in {3, 4} or t.shape[-2] != positions for t in tensors):
            return None
        if any(t.shape[0] % batch for t in tensors):
            return None
        # Those who flatten batch and head into one axis keep the batch outermost.
        return [t if t.ndim == 4 else t.unflatten(0, (batch, -1)) for t in tensors]

    def _see(self, kind: Kind, tensor: Tensor, linear: Map | None = None) -> Tensor:
        path, _ = self._running[-1] if self._running else ("", 0)
        number = self._counts[path, kind]
        self._counts[path, kind] += 1
        exchanged = self._show(Tap(path, kind, number), tensor, linear)
        return tensor if exchanged is None else exchanged

    def _enter(self, module: nn.Module, inputs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        path = self._names[id(module)]
        number = self._counts[path, "entered"]
        self._counts[path, "entered"] += 1
        self._running.append((path, number))
        if (given := _first(inputs)) is None:
            return None
        return _exchanged(inputs, given, self._show(Tap(path, "input", number), given, None))

    def _leave(self, _module: nn.Module, inputs: Any, *keywords_and_output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        path, number = self._running.pop()
        # Where the module raised, torch leaves the keywords out.
        if len(keywords_and_output) == 1 or keywords_and_output[1] is None:
            return None
        keywords, output = keywords_and_output
        if _first(inputs) is None and (given := _first(tuple(keywords.values()))) is not None:
            self._show(Tap(path, "input", number), given, None)
        if (given := _first(output)) is None:
            return None
        return _exchanged(output, given, self._show(Tap(path, "output", number), given, None))


def _exchanging(
    func: Any, name: str, at: int, args: Any, kwargs: Any
) -> Callable[[Tensor], Tensor]:
    """The function called as it was, but for one of its tensors."""

    def call(tensor: Tensor) -> Tensor:
        if at < len(args):
            made: Tensor = func(*args[:at], tensor, *args[at + 1 :], **kwargs)
        else:
            made = func(*args, **{**kwargs, name: tensor})
        return made

    return call


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _first(values: Any) -> Tensor | None:
    """The first tensor of a module's arguments, or of what it returned."""
    several = values if isinstance(values, tuple | list) else (values,)
    first: Tensor | None = next((value for value in several if isinstance(value, Tensor)), None)
    return first if first is not None and first.is_floating_point() else None


def _exchanged(values: Any, old: Tensor, new: Tensor | None) -> Any:
    """A module's arguments, or what it returned, with one tensor for another; None: no change."""
    if new is None:
        return None
    if isinstance(values, tuple | list):
        return type(values)(new if value is old else value for value in values)
    return new


def _weighs(matrix: Tensor) -> bool:
    """Whether every row is non-negative and sums to one, or to less where a sink takes the rest."""
    return bool((matrix >= 0).all()) and bool((matrix.sum(-1) < 1.01).all())
