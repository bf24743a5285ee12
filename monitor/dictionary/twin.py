"""The untrained twin of a model: the same architecture and the same numbers, in no order."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from monitor.streams import UnseenError


@contextmanager
def shuffled(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, the entries of each weight matrix of `model` are shuffled among themselves, by the
    same permutation whenever its name, shape and the seed are the same; afterwards every parameter
    has its own memory again, which nobody wrote to. Vectors (the gains of norms, biases) are as
    they were. It takes the memory of the matrices once more.

    Raises `UnseenError` where a matrix is not made of plain numbers.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    for name, matrix in matrices.items():
        if not matrix.is_floating_point() or type(matrix.data) is not Tensor:
            kind = f"{type(matrix.data).__name__} of {matrix.dtype}"
            raise UnseenError(f"no untrained twin: {name} is a {kind}, and cannot be shuffled")
    own = {name: matrix.data for name, matrix in matrices.items()}
    try:
        for name, matrix in matrices.items():
            # Exchanging `data` leaves versions and gradients alone: a backward pass that is under
            # way does not notice.
            matrix.data = _in_no_order(own[name], zlib.crc32(f"{seed} {name}".encode()))
        yield
    finally:
        for name, matrix in matrices.items():
            matrix.data = own[name]


def _in_no_order(matrix: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(matrix.numel(), generator=random)
    return matrix.flatten()[order.to(matrix.device)].view(matrix.shape)
