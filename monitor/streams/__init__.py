"""What a forward pass shows of the residual stream, where the parts of the model are known."""

from monitor.streams.sample import StreamSample, sampled_positions

__all__ = ["StreamSample", "sampled_positions"]
