"""Running a model in the middle of its training without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode, without gradients, autocast or compilation; afterwards
    everything is as it was: every submodule's mode, attributes and buffers, the random streams of
    Python, NumPy and torch (CPU and CUDA), the gradient mode and autocast. Weights that fully
    sharded modules (FSDP2) gathered for a pass are let go of: an optimizer step would leave them
    behind.

    Modes are set one by one: `model.eval()` would run whatever a user's `train()` override does.
    `no_grad` and not `inference_mode`, since modules may lazily keep a tensor that training uses
    later. What a module changes inside a list or dictionary of its own stays changed.
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    contents = {
        id(buffer): (buffer, buffer._version, buffer.detach().clone())
        for named in buffers
        for buffer in named.values()
        if buffer is not None
    }
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices()))
        stack.enter_context(torch.no_grad())
        stack.enter_context(exact(*{p.device.type for p in model.parameters()}))
        # Nothing was compiled where dynamo was never imported, and importing it takes a second.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if "torch.nn.attention.flex_attention" in sys.modules:
            stack.enter_context(_flex_attention_uncompiled())
        if sharded := [module for module in modules if is_fully_sharded(module)]:
            stack.enter_context(_sharded_again(sharded))
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, attribute, buffer in zip(modules, attributes, buffers, strict=True):
                _restore(vars(module), attribute)
                _restore(module._buffers, buffer)
            for kept, version, content in contents.values():
                if kept._version != version:
                    kept.copy_(content)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def exact(*device_types: str) -> Iterator[None]:
    """Inside, no autocast region that this may be in makes anything less precise."""
    with ExitStack() as stack:
        for device_type in {"cpu", *device_types}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def is_fully_sharded(module: Any) -> bool:
    """Whether a module is an FSDPModule; importing that class would take a second."""
    return hasattr(type(module), "unshard") and hasattr(type(module), "reshard")


@contextmanager
def _sharded_again(modules: list[Any]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for module in modules:
            # A pass that broke off leaves the root taking the next one for its continuation. Other
            # modules than the root refuse, and older versions of torch know no way.
            with suppress(AttributeError, RuntimeError):
                module.reset_iter_state()
        raise
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def _flex_attention_uncompiled() -> Iterator[None]:
    """It compiles itself wherever nobody else does, and warns where that is forbidden."""
    module = sys.modules["torch.nn.attention.flex_attention"]
    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    before = getattr(module, switch, None)
    setattr(module, switch, True)
    try:
        yield
    finally:
        setattr(module, switch, before)


def _restore(current: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in current.keys() - saved.keys():
        del current[name]
    for name, value in saved.items():
        if current.get(name) is not value:
            current[name] = value


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
