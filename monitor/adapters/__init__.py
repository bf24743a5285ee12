"""The ways in which models write attention: one family, one file.

An adapter recognises a call of a torch function as attention over a whole stimulus. Where a module
computes attention in a way of its own, a user's `ModuleAdapter` reads it after the module has run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from monitor.adapters import flex, scaled_dot_product, softmax
from monitor.attention import AttentionCall, Pattern, SelfAttention

# From a function, its arguments and the shape [batch, position] of the stimulus to what it computes
# there; None where that is not attention over the stimulus.
Adapter = Callable[[Any, Sequence[Any], Mapping[str, Any], Sequence[int]], AttentionCall | None]

ADAPTERS: tuple[Adapter, ...] = (scaled_dot_product.read, softmax.read, flex.read)

# Half precision sums to 1 no better than this.
_ROUNDING = 0.02

# From a module, the arguments and keyword arguments of its forward, and what that returned.
ModuleAdapter = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], AttentionCall]


def recognised(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int]
) -> AttentionCall | None:
    """The attention over tokens of `shape` [batch, position] that a function is about to compute,
    or None.
    """
    for adapter in ADAPTERS:
        if (call := adapter(function, args, kwargs, shape)) is not None:
            return call
    return None


class AdapterError(ValueError):
    """What a user's adapter returned is no attention over the stimulus; the message says why."""


def read_module(  # noqa: PLR0917 -- what hooks are given, and two more
    adapters: Mapping[type[nn.Module], ModuleAdapter],
    shape: Sequence[int],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> AttentionCall:
    """The attention over tokens of `shape` [batch, position] that a user's adapter reads.

    Raises `AdapterError` where it returns anything else.
    """
    batch, positions = shape
    read = next(read for kind, read in adapters.items() if isinstance(module, kind))
    call = read(module, args, kwargs, output)
    where = f"the adapter for {type(module).__name__} returned"
    if isinstance(call, Pattern):
        found, expected = call.weights, f"[{batch}, head, {positions}, {positions}]"
        if found.ndim == 4 and found.shape[::2] == (batch, positions) == (batch, found.shape[3]):
            total = found.sum(-1)
            if bool((found < 0).any() or (total > 1 + _ROUNDING).any()):
                raise AdapterError(
                    f"{where} a Pattern with weights down to {found.min():.3g} and rows that sum "
                    f"to {total.max():.3g}; expected attention after the softmax: rows of 1, or "
                    "less where something that is no token takes a share"
                )
            return call
    elif isinstance(call, SelfAttention):
        found, expected = call.query, f"[{batch}, head, {positions}, feature]"
        if found.ndim == 4 and found.shape[::2] == (batch, positions):
            return call
    else:
        raise AdapterError(
            f"{where} {type(call).__name__}; expected a monitor.attention.Pattern or SelfAttention"
        )
    raise AdapterError(
        f"{where} a {type(call).__name__} of shape {list(found.shape)}; expected {expected}"
    )


def check_adapters(
    adapters: Mapping[type[nn.Module], ModuleAdapter] | None,
) -> dict[type[nn.Module], ModuleAdapter]:
    """The adapters of a user, none for None.

    Raises `TypeError` where they are no mapping from module classes to functions.
    """
    expected = (
        "expected a dictionary from classes of modules to functions "
        "read(module, args, kwargs, output) that return a Pattern or a SelfAttention"
    )
    if not isinstance(adapters, Mapping | None):
        raise TypeError(f"adapters={adapters!r}: {expected}")
    for kind, read in (adapters or {}).items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)) or not callable(read):
            raise TypeError(f"adapters has the entry {kind!r}: {read!r}; {expected}")
    return dict(adapters or {})
