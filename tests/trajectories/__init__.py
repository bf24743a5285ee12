"""Series on which what finds transitions is tried: simulated ones whose truth is known, and
recorded trainings. Heights are in standard deviations of the noise, whatever its kind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

NOISES = ("white", "ar0.5", "ar0.9", "heavy")
"""Kinds of noise, each of mean 0 and standard deviation 1: independent and Gaussian;
autoregressive; Student's t with 3 degrees of freedom."""

NULLS = ("flat", "ramp", "decay", "log", "spike", "slow_wave")
"""Kinds of curves without a transition."""


def noise(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of one of the `NOISES`."""
    if kind == "white":
        return rng.standard_normal(length)
    if kind == "heavy":
        return rng.standard_t(3, length) / np.sqrt(3)
    rho = float(kind.removeprefix("ar"))
    steps, values = rng.standard_normal(length) * np.sqrt(1 - rho**2), np.empty(length)
    values[0] = rng.standard_normal()
    for at in range(1, length):
        values[at] = rho * values[at - 1] + steps[at]
    return values


def null(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """A curve of one of the `NULLS`, 0 to 20 high, in one direction or the other."""
    at = np.arange(length) / length
    height = rng.uniform(0, 20) * rng.choice([-1, 1])
    if kind == "flat":
        return np.zeros(length)
    if kind == "ramp":
        return height * at
    if kind == "decay":
        return height * (1 - np.exp(-at / rng.uniform(0.05, 0.5)))
    if kind == "log":
        return height * np.log1p(at * length) / np.log1p(length)
    if kind == "spike":
        where = rng.integers(length // 4, length)
        return height * (np.arange(length) == where)
    return height / 10 * np.sin(2 * np.pi * (at * rng.uniform(0.5, 2) + rng.uniform()))


def sigmoid(length: int, *, midpoint: float, width: float, height: float) -> np.ndarray:
    """A logistic curve that goes from 10% to 90% of its height in `width` measurements."""
    at = (np.arange(length) - midpoint) / width
    return height / (1 + np.exp(-2 * np.log(9) * at))


def recorded(name: str) -> pd.DataFrame:
    """One of the recorded trainings, by the name of its file without `.csv`."""
    return pd.read_csv(Path(__file__).with_name(f"{name}.csv"))
