"""What is kept of a model's weights so that others can be told from them without a copy: a digest,
and a sketch from which the distance to other weights can be estimated.

Shapes: `projection` sums of weights with random signs.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PROJECTIONS = 512

# Weights are added up in rows of so many, with a sign each, which are the same again after so many
# rows; and then every row gets a sign and a place of its own.
_ROW, _ROWS = 256, 512

# So many weights are looked at at a time.
_PASS = 64 * _ROW * _ROWS


def digest(module: nn.Module) -> str:
    """The same for the same parameters, on every device: of their names, types, shapes and bits."""
    whole = hashlib.blake2b(digest_size=16)
    for name, parameter in _parameters(module):
        whole.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        bits: Any = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        whole.update(bits)
    return whole.hexdigest()


def sketch(module: nn.Module) -> Float[Tensor, " projection"]:
    """Sums over all parameters with random signs, the same for the same names and shapes, so that
    the squared distance of two sketches is on average that of the weights (Charikar et al. 2002,
    Finding frequent items in data streams).

    >>> a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    >>> apart = sum((p - q).square().sum() for p, q in zip(a.parameters(), b.parameters()))
    >>> bool(0.7 < (sketch(a) - sketch(b)).square().sum() / apart < 1.4)
    True
    """
    within = _signs(_ROWS * _ROW, torch.Generator().manual_seed(0)).view(_ROWS, _ROW)
    sums: Float[Tensor, " projection"] = torch.zeros(PROJECTIONS)
    for name, parameter in _parameters(module):
        random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for part in parameter.detach().flatten().split(_PASS):
            rows = _rows(part.float(), within.to(part.device)).cpu()
            place = torch.randint(PROJECTIONS, (len(rows),), generator=random)
            sums.index_add_(0, place, rows * _signs(len(rows), random))
    return sums


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """In an order that does not depend on that of the modules; tied ones once."""
    return iter(sorted(module.named_parameters(), key=lambda named: named[0]))


def _rows(
    weights: Float[Tensor, " weight"], within: Float[Tensor, "row place"]
) -> Float[Tensor, " sum"]:
    padded = F.pad(weights, (0, -len(weights) % _ROW)).view(-1, _ROW)
    whole = len(padded) // _ROWS * _ROWS
    several = torch.einsum("brp,rp->br", padded[:whole].view(-1, _ROWS, _ROW), within).flatten()
    return torch.cat([several, (padded[whole:] * within[: len(padded) - whole]).sum(1)])


def _signs(count: int, random: torch.Generator) -> Float[Tensor, " sign"]:
    return torch.randint(2, (count,), generator=random).float() * 2 - 1
