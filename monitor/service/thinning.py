"""Fewer points of a series, with its extremes."""

from __future__ import annotations

from typing import Any

import numpy as np


def kept(values: np.ndarray[Any, Any], points: int) -> np.ndarray[Any, Any]:
    """Which of `values` to show, in order, where at most `points` (4 or more) can be.

    The first, the last, and of every one of equally many stretches the lowest and the highest; what
    is not a number is shown only where there is room for all.

    >>> kept(np.array([0.0, 0, 9, 0, 0, -9, 0, 0]), 4)
    array([0, 2, 5, 7])
    """
    if len(values) <= points:
        return np.arange(len(values))
    numbers = np.flatnonzero(~np.isnan(values))
    ends = np.array([0, len(values) - 1])
    if len(numbers) == 0:
        return ends
    stretches = (points - 2) // 2
    bounds = np.unique(np.arange(stretches) * len(numbers) // stretches)
    of = np.searchsorted(bounds, np.arange(len(numbers)), side="right")
    order = np.lexsort((values[numbers], of))
    lowest = order[bounds]
    highest = order[np.append(bounds[1:], len(numbers)) - 1]
    return np.unique(np.concatenate([ends, numbers[lowest], numbers[highest]]))
