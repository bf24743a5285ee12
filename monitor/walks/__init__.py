"""The local learning coefficient: how fast the loss rises around the weights as they are, from
random walks in a copy of them.

devinterp, which others measure it with, was looked at: it needs datasets, xarray and zarr, and its
optimizers step the weights of a model itself. Given the same numbers its steps agree with these.
"""

from __future__ import annotations

from monitor.walks.langevin import (
    Chain,
    Options,
    Potential,
    Sampled,
    Setting,
    prepared,
    walked,
)
from monitor.walks.mixing import effective_draws, split_rhat
from monitor.walks.text import TextLoss

__all__ = [
    "Chain",
    "Options",
    "Potential",
    "Sampled",
    "Setting",
    "TextLoss",
    "effective_draws",
    "prepared",
    "split_rhat",
    "walked",
]
