"""What one computation of attention shows, reduced without ever holding the pattern."""

from __future__ import annotations

from monitor.attention.layer import AttentionCall, LayerAttention
from monitor.attention.projected import SelfAttention
from monitor.attention.rows import Pattern, Scores

__all__ = ["AttentionCall", "LayerAttention", "Pattern", "Scores", "SelfAttention"]
