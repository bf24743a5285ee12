"""What a pass over labelled tokens shows of features: directions, neurons, and how well they tell
concepts apart. Each kind of collector has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from monitor.features.analogies import WordProductsCollector
from monitor.features.collecting import NO_CONCEPTS, Chunk, Collector, collect
from monitor.features.directions import (
    METHODS,
    Directions,
    DirectionsCollector,
)
from monitor.features.neurons import NeuronsCollector
from monitor.features.readable import ReadableCollector
from monitor.features.sparse import SparseCollector
from monitor.parts import Parts
from monitor.stimuli import Stimulus

COLLECTORS: Mapping[str, Callable[[Parts, Stimulus], Collector]] = {
    "analogies": WordProductsCollector,
    "directions": DirectionsCollector,
    "sparse": SparseCollector,
    "readable": ReadableCollector,
    "neurons": NeuronsCollector,
}

# What is nothing without labels.
OF_LABELS = frozenset({"analogies", "directions", "readable", "sparse"})

__all__ = [
    "COLLECTORS",
    "METHODS",
    "NO_CONCEPTS",
    "OF_LABELS",
    "Chunk",
    "Collector",
    "Directions",
    "collect",
]
