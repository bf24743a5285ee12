"""Attention by torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from monitor.attention import SelfAttention

# As torch has it, whatever stands under its name while attention is watched.
FUNCTION = F.scaled_dot_product_attention


def read(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], shape: Sequence[int]
) -> SelfAttention | None:
    """The attention that `scaled_dot_product_attention` is about to compute."""
    if function is not FUNCTION:
        return None
    return SelfAttention.of(shape, *args, **kwargs)
