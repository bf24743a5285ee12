"""Weights of a model, referred to by where they are, so that they are always the current ones.

Shapes: a linear map takes `feature` numbers to `output` numbers; `weight` is [output feature].
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from monitor.parts.flow import Map
from monitor.untouched import untouched

_LARGE = 128.0


@runtime_checkable
class Linear(Protocol):
    """A linear map of a model."""

    def read(
        self,
    ) -> tuple[Float[Tensor, "output feature"], Float[Tensor, " output"] | None]:
        """Its weight and bias as the model has them now."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _View:
    """A parameter or buffer of a model as it is, transposed, or a part of it."""

    model: nn.Module
    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> Tensor:
        tensor: Tensor = operator.attrgetter(self.name)(self.model)
        return tensor.detach().as_strided(self.size, self.stride, self.offset)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrix:
    """A linear map by parameters of the model."""

    weight: _View
    bias: _View | None

    @classmethod
    def of(cls, model: nn.Module, linear: Map) -> Matrix | None:
        """Where the model has the weights of a map; None where they are computed on the way."""
        weight = _locate(model, linear.weight)
        bias = None if linear.bias is None else _locate(model, linear.bias)
        if weight is None or (linear.bias is not None and bias is None):
            return None
        return cls(weight=weight, bias=bias)

    def read(
        self,
    ) -> tuple[Float[Tensor, "output feature"], Float[Tensor, " output"] | None]:
        """The parameters, not copied."""
        return self.weight.read(), None if self.bias is None else self.bias.read()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """A linear map by a module that is no single matrix (a low-rank adapter beside its base, say),
    read from what the module makes of unit vectors.
    """

    module: nn.Module
    features: int

    def read(
        self,
    ) -> tuple[Float[Tensor, "output feature"], Float[Tensor, " output"] | None]:
        """Runs the module."""
        parameter = next(self.module.parameters())
        # Large beside the bias, with which they are rounded.
        units = _LARGE * torch.eye(self.features, dtype=parameter.dtype, device=parameter.device)
        with untouched(self.module):
            output = self.module(torch.cat([torch.zeros_like(units[:1]), units])[None])[0]
        bias = output[0]
        return ((output[1:].double() - bias.double()) / _LARGE).to(bias.dtype).T, bias


def _locate(model: nn.Module, tensor: Tensor) -> _View | None:
    memory = tensor.untyped_storage().data_ptr()
    for named in (model.named_parameters(), model.named_buffers()):
        for name, own in named:
            if own.dtype == tensor.dtype and own.untyped_storage().data_ptr() == memory:
                return _View(
                    model=model,
                    name=name,
                    size=tuple(tensor.shape),
                    stride=tensor.stride(),
                    offset=int(tensor.storage_offset()),
                )
    return None
