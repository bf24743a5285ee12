"""The log-sum-exp of attention scores, from the kernels that compute it on their way.

These operators are private to torch. What one refuses, or gets wrong on this machine, is computed
in blocks of queries instead.

Shapes: `batch head query key feature`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

# The mixed values [batch head query channel], and the log-sum-exp of the scores [batch head query].
Kernel = Callable[..., tuple[Tensor, Tensor]]


def log_sum_exp(
    query: Float[Tensor, "batch head query feature"],
    key: Float[Tensor, "batch head key feature"],
    value: Float[Tensor, "batch head key channel"],
    *,
    bias: Float[Tensor, "#batch #head query key"] | None,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "batch head query channel"], Float[Tensor, "batch head query"]] | None:
    """What attention mixes from the values, and the log-sum-exp of every query's scores.

    All are in float32, and `bias` adds to the scores. None where no kernel does that here.
    """
    kernel = _KERNELS.get(query.device.type)
    if kernel is None or not _is_right(kernel, query.device, query.shape[-1], bias is not None):
        return None
    try:
        return kernel(query, key, value, bias=bias, is_causal=is_causal, scale=scale)
    except (RuntimeError, AttributeError):
        return None


def _cpu_flash(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if bias is not None and not bool((query.sum() + key.sum()).isfinite()):
        raise RuntimeError("with a mask this kernel takes what is not a number for hidden")
    mixed, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
    )
    return mixed, lse


def _cuda_efficient(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel and not flash attention, which has no float32."""
    if bias is not None:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    mixed, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, is_causal, scale=scale
    )
    # Its rows are padded to a multiple of 32.
    return mixed, lse[..., : query.shape[2]]


_KERNELS: dict[str, Kernel] = {"cpu": _cpu_flash, "cuda": _cuda_efficient}


@functools.cache
def _is_right(kernel: Kernel, device: torch.device, features: int, masked: bool) -> bool:
    """Whether the kernel agrees with plain arithmetic on a small case of its own."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(
        (2, 1, 2, 40, features), generator=generator, dtype=torch.float32, device="cpu"
    ).to(device)
    scores = query @ key.transpose(-1, -2)
    hidden = torch.ones_like(scores[:, :1], dtype=torch.bool).triu(1)
    bias = torch.zeros_like(scores[:, :1]).masked_fill(hidden, -torch.inf)
    scores += bias
    try:
        mixed, lse = kernel(
            query, key, key, bias=bias if masked else None, is_causal=not masked, scale=1.0
        )
    except (RuntimeError, AttributeError):
        return False
    return torch.allclose(lse, scores.logsumexp(-1), atol=1e-4) and torch.allclose(
        mixed, scores.softmax(-1) @ key, atol=1e-4
    )
