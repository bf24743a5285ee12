"""What a pass over labelled tokens shows of features: directions, neurons, and how well they tell
concepts apart. Each kind of collector has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from monitor.features.analogies import WordProductsCollector
from monitor.features.collecting import Chunk, Collector, collect
from monitor.parts import Parts
from monitor.stimuli import Stimulus

COLLECTORS: Mapping[str, Callable[[Parts, Stimulus], Collector]] = {
    "analogies": WordProductsCollector,
}

__all__ = ["COLLECTORS", "Chunk", "Collector", "collect"]
