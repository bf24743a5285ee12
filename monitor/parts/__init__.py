"""The parts of any transformer language model: its residual stream, per-head matrices, MLPs, norms,
embedding and unembedding, found by what flows through it and checked against its own pass.
"""

from monitor.parts.blocks import Block, Parts
from monitor.parts.find import find_parts
from monitor.parts.verify import verify
from monitor.parts.watching import SITES, Site, activations, watch

__all__ = ["SITES", "Block", "Parts", "Site", "activations", "find_parts", "verify", "watch"]
