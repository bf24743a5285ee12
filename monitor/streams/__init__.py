"""What a forward pass shows of the residual stream, where the parts of the model are known: a
sample of it, what the unembedding would make of that, and what every component writes.
"""

from monitor.streams.attribution import AttributionSums, Component
from monitor.streams.lens import LensSums
from monitor.streams.reading import UnseenError
from monitor.streams.sample import StreamSample, sampled_positions
from monitor.streams.seeing import Kind, Streams

__all__ = [
    "AttributionSums",
    "Component",
    "Kind",
    "LensSums",
    "StreamSample",
    "Streams",
    "UnseenError",
    "sampled_positions",
]
