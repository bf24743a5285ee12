"""Transitions in a finished series: found, declared only against smooth alternatives, and measured
with intervals.

A transition is a rise or a fall between two levels, or between two stretches of one slope, with one
of the forms of `curves.rise`; `declaring` says which count. What fools it: a series that is smooth
in a way of its own and hardly noisy, for which any wrong form is highly significant (a cubic, say);
a slow drift along the logarithm of the step, as three of the recorded trainings without induction
have; and a real change that is not the one looked for, which this cannot tell. A wide transition
near either end is often taken for an exponential, and missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped

from monitor.transitions.declaring import declared
from monitor.transitions.rises import Rise, drawn

FEWEST = 8
"""With fewer finite measurements nothing is said."""

SHARP = 1 / 20
"""The share of the series below which a transition is called sharp."""

# Standard deviations, of what measurements usually differ from their neighbours by.
_SPIKE = 6.0
# Relative to the values: a spread that their last digits make.
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One transition, in the units of the steps and values it was found in.

    `_low` and `_high` bound 95% intervals. What lies outside the measurements is nan, with an
    interval open to the side where it lies.

    Attributes:
        direction: `up` or `down`.
        onset: where 10% of the height is gone.
        midpoint: where 50% is.
        end: where 90% is.
        width: from onset to end.
        height: how far, without its sign; the slope that goes on before and after left out.
        delta_bic: by how much its BIC beats that of the best smooth curve.
        noise: standard deviation of what the curve leaves.
        rho: autocorrelation of what the curve leaves, from one measurement to the next.
        resolution: distance between the measurements around the midpoint: nothing is known of what
            is narrower.
        sharp: its width is below `SHARP` of the series.
        n: measurements it was fitted to.
        validity: `ok`, or what of it lies outside the measurements.
    """

    direction: Literal["up", "down"]
    onset: float
    onset_low: float
    onset_high: float
    midpoint: float
    midpoint_low: float
    midpoint_high: float
    end: float
    end_low: float
    end_high: float
    width: float
    width_low: float
    width_high: float
    height: float
    height_low: float
    height_high: float
    delta_bic: float
    noise: float
    rho: float
    resolution: float
    sharp: bool
    n: int
    validity: str


def fit(
    step: Any,
    value: Any,
    *,
    axis: Literal["step", "log_step"] = "step",
    seed: int = 0,
    resamples: int = 1000,
    min_delta_bic: float = 10.0,
) -> list[Transition]:
    """The transitions of a series in the order of their midpoints, none where it is not clear.

    The intervals hold the middle 95% of `resamples` draws from the posterior of midpoint, width,
    height, form and autocorrelation, given Gaussian AR(1) noise: the uncertainty of the
    autocorrelation is part of them, which a bootstrap of residuals leaves out. They are those of
    one transition, the others being what they were found to be.

    Args:
        step: increasing: steps or tokens, a number for each measurement. With `log_step` what is
            at 0 is left out.
        value: as many numbers; those that are not finite are left out, and so are lone spikes.
        axis: whether a transition has its form along the steps or their logarithm.
        seed: of the draws.
        resamples: how many draws.
        min_delta_bic: a smaller one does not count.

    Raises:
        ValueError: the series are not two of one length, or the steps do not increase.
    """
    step, value = _checked(step, value, axis, resamples)
    kept = np.isfinite(value) & ((step > 0) | (axis == "step"))
    step, value = step[kept], value[kept]
    if len(step) < FEWEST:
        return []
    kept = ~_spikes(value)
    step, value = step[kept], value[kept]
    # Divided first, so that squares neither overflow nor vanish.
    largest = float(np.abs(value).max())
    value = value / (largest or 1.0)
    spread = float(np.std(value))
    if len(step) < FEWEST or spread < _ROUNDING:
        return []
    line = _Line(step=step, axis=axis)
    found = declared(line.x(), (value - value.mean()) / spread, min_delta_bic)
    rng = np.random.default_rng(seed)
    return [
        _measured(
            forms, delta_bic=delta, line=line, spread=spread * largest, rng=rng, resamples=resamples
        )
        for forms, delta in sorted(found, key=lambda each: each[0][0].midpoint)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """Steps, and where they lie between 0 and 1 along the axis."""

    step: Float[np.ndarray, " measurement"]
    axis: Literal["step", "log_step"]

    def x(self) -> Float[np.ndarray, " measurement"]:
        along = self.step if self.axis == "step" else np.log(self.step)
        x: Float[np.ndarray, " measurement"] = (along - along[0]) / (along[-1] - along[0])
        return x

    def back(self, x: Shaped[np.ndarray, "..."] | float) -> Shaped[np.ndarray, "..."]:
        """Steps of places along the axis."""
        first, last = self.step[0], self.step[-1]
        if self.axis == "step":
            return np.asarray(first + x * (last - first))
        with np.errstate(over="ignore"):
            return np.asarray(first * np.exp(x * np.log(last / first)))


def _measured(
    forms: list[Rise],
    *,
    delta_bic: float,
    line: _Line,
    spread: float,
    rng: np.random.Generator,
    resamples: int,
) -> Transition:
    """What was found, in the units of the series."""
    best, draws = forms[0].numbers(), drawn(forms, resamples, rng)
    sign = np.sign(best["height"])
    number, sample = (
        {
            "onset": line.back(of["onset"]),
            "midpoint": line.back(of["midpoint"]),
            "end": line.back(of["end"]),
            "width": line.back(of["end"]) - line.back(of["onset"]),
            "height": sign * of["height"] * spread,
        }
        for of in (best, draws)
    )
    fields: dict[str, float] = {}
    for name, value in number.items():
        low, high = np.quantile(sample[name], [0.025, 0.975])
        fields[name] = float(value)
        fields[f"{name}_low"] = float(min(low, value))
        fields[f"{name}_high"] = float(max(high, value))
    outside = []
    if number["onset"] < line.step[0]:
        outside.append("began before the first measurement")
        fields |= {"onset": np.nan, "onset_low": -np.inf}
    if number["end"] > line.step[-1]:
        outside.append("not ended by the last measurement")
        fields |= {"end": np.nan, "end_high": np.inf}
    if outside:
        fields |= {"width": np.nan, "width_high": np.inf, "height": np.nan, "height_high": np.inf}
    after = int(np.searchsorted(line.step, number["midpoint"]))
    return Transition(
        direction="up" if sign > 0 else "down",
        delta_bic=delta_bic,
        noise=forms[0].noise * spread,
        rho=forms[0].rho,
        resolution=float(line.step[after] - line.step[after - 1]),
        sharp=best["width"] < SHARP,
        n=len(line.step),
        validity=", ".join(outside) or "ok",
        **fields,
    )


def _checked(
    step: Any,
    value: Any,
    axis: str,
    resamples: int,
) -> tuple[Float[np.ndarray, " measurement"], Float[np.ndarray, " measurement"]]:
    step, value = np.asarray(step, dtype=np.float64), np.asarray(value, dtype=np.float64)
    if step.ndim != 1 or step.shape != value.shape:
        raise ValueError(
            f"steps of shape {step.shape} and values of shape {value.shape} arrived; expected two "
            "series of one length: fit one series at a time"
        )
    if axis not in ("step", "log_step"):
        raise ValueError(f"axis is {axis!r}; expected 'step' or 'log_step'")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected 1 or more, 1000 for an interval")
    if not np.isfinite(step).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(step))} of {len(step)} steps are not finite: leave "
            "their measurements out"
        )
    (back,) = np.nonzero(np.diff(step) <= 0)
    if len(back):
        raise ValueError(
            f"steps must increase, and after {step[back[0]]:.17g} comes {step[back[0] + 1]:.17g}: "
            "sort the measurements and keep one of each step"
        )
    if axis == "log_step" and (step < 0).any():
        raise ValueError(
            f"the first step is {step[0]:.17g}, and what is below 0 has no logarithm: use "
            "axis='step'"
        )
    return step, value


def _spikes(value: Float[np.ndarray, " measurement"]) -> Bool[np.ndarray, " measurement"]:
    """Where one or two measurements lie far outside what lies on either side of them.

    The first and the last have one side only, and stay.
    """
    inner = value[1:-1]
    medians = _medians(value, 2, 3)
    # The three before a measurement end, and the three after it start, beside it.
    sides = np.stack([medians[: len(inner)], medians[-len(inner) :]])
    outside = np.maximum(sides.min(axis=0) - inner, inner - sides.max(axis=0))
    differences = np.abs(inner - sides.mean(axis=0))
    # Here as well as everywhere: many series are quiet until something forms, and noisy then.
    usual = np.maximum(np.median(differences), _medians(differences, 10, 21))
    lone = outside > np.maximum(_SPIKE * 1.4826 * usual, _ROUNDING * np.ptp(value))
    return np.pad(lone, 1, constant_values=False)


def _medians(
    values: Float[np.ndarray, " measurement"], beyond: int, many: int
) -> Float[np.ndarray, " window"]:
    """Of `many` neighbours, in windows that reach `beyond` the ends."""
    padded = np.pad(values, beyond, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, many)
    medians: Float[np.ndarray, " window"] = np.nanmedian(windows, axis=1)
    return medians
