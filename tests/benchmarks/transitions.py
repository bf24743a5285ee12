"""How often `monitor.transitions.fit` finds what is there and declares what is not, and how often
its intervals hold the truth, beside plain and block bootstraps of the residuals of a logistic fit.

Found is what lies within a width, or five measurements, of the midpoint, and goes its way. Series
have 100 to 200 measurements; transitions are 2 to 30 wide and 5 to 20 standard deviations high.
The bootstraps are of the series in which it was found, and start from the true curve.

`make bench-transitions`, or with `ARGS="--trials 100"` for more series than 20 of each kind.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import expit

from monitor.transitions import Transition, fit
from tests.trajectories import NOISES, NULLS, noise, null, sigmoid

QUANTITIES = ("onset", "midpoint", "end", "width", "height")

Bounds = dict[str, tuple[float, float]]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="make bench-transitions", description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="series of each kind")
    Console(width=110).print(table(parser.parse_args().trials))


def table(trials: int, *, resamples: int = 200) -> Table:
    """A column for each kind of noise; so many series with a transition, and of each null."""
    printed = Table(title=f"Transitions found afterwards, {trials} series each")
    printed.add_column("")
    for kind in NOISES:
        printed.add_column(kind, justify="right")
    columns = [_column(kind, trials, resamples) for kind in NOISES]
    for row in columns[0]:
        printed.add_row(row, *(column[row] for column in columns))
    return printed


def _column(kind: str, trials: int, resamples: int) -> dict[str, str]:
    found, others, covered = _positives(kind, trials, resamples)
    column = {"found, of 100": _of_100(found, trials), "others beside it": _of_100(others, trials)}
    for curve in NULLS:
        column[f"declared in {curve}"] = _of_100(_false(curve, kind, trials), trials)
    for method, hits in covered.items():
        for name, held in zip(QUANTITIES, np.mean(hits, axis=0), strict=True):
            column[f"{method}: {name}"] = f"{100 * held:.0f}%"
    return column


def _of_100(count: int, trials: int) -> str:
    return f"{100 * count / trials:.1f}"


def _positives(kind: str, trials: int, resamples: int):
    rng = np.random.default_rng(NOISES.index(kind))
    found = others = 0
    covered = defaultdict(list)
    for _ in range(trials):
        length, width = int(rng.integers(100, 201)), rng.uniform(2, 30)
        midpoint, sign = rng.uniform(0.25, 0.75) * length, rng.choice([-1, 1])
        height = rng.uniform(5, 20)
        value = sign * sigmoid(length, midpoint=midpoint, width=width, height=height)
        value = value + noise(kind, length, rng)
        truth = _quantities(midpoint, width, height)
        transitions = fit(np.arange(length), value)
        right = [each for each in transitions if _is(each, midpoint, width, sign)][:1]
        others += len(transitions) - len(right)
        for one in right:
            found += 1
            of = {
                "95% interval": {
                    name: (getattr(one, f"{name}_low"), getattr(one, f"{name}_high"))
                    for name in QUANTITIES
                },
                "block bootstrap": _bootstrap(sign * value, truth, _blocks, resamples, rng),
                "plain bootstrap": _bootstrap(sign * value, truth, _plain, resamples, rng),
            }
            for method, bounds in of.items():
                covered[method].append(
                    [bounds[name][0] <= truth[name] <= bounds[name][1] for name in QUANTITIES]
                )
    return found, others, covered


def _is(one: Transition, midpoint: float, width: float, sign: int) -> bool:
    near = abs(one.midpoint - midpoint) < max(width, 5)
    return near and (one.direction == "up") == (sign > 0)


def _false(curve: str, kind: str, trials: int) -> int:
    """How many series had one declared, or more."""
    rng = np.random.default_rng([NULLS.index(curve), NOISES.index(kind)])
    lengths = rng.integers(100, 201, size=trials)
    return sum(
        bool(fit(np.arange(n), null(curve, n, rng) + noise(kind, n, rng), resamples=1))
        for n in map(int, lengths)
    )


def _quantities(midpoint: float, width: float, height: float) -> dict[str, float]:
    onset = midpoint - width / 2
    numbers = (onset, midpoint, onset + width, width, height)
    return dict(zip(QUANTITIES, numbers, strict=True))


def _bootstrap(
    value: np.ndarray,
    truth: dict[str, float],
    drawn: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> Bounds:
    """The middle 95% of fits to the fitted curve with its residuals drawn again."""
    at = np.arange(len(value))
    start = [0, truth["height"], truth["midpoint"], np.log(truth["width"])]
    best = _logistic_fit(at, value, start)
    curve = _logistic(at, *best)
    samples = []
    for _ in range(resamples):
        _, height, midpoint, width = _logistic_fit(at, curve + drawn(value - curve, rng), best)
        samples.append(list(_quantities(midpoint, np.exp(width), height).values()))
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(QUANTITIES, low, high, strict=True)}


def _plain(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(residuals, len(residuals))


def _blocks(residuals: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Moving blocks of 15, of which the noise forgets most in the worst case, ρ = 0.9."""
    starts = rng.integers(0, len(residuals) - 14, size=len(residuals) // 15 + 1)
    return residuals[(starts[:, None] + np.arange(15)).ravel()[: len(residuals)]]


def _logistic(at, level, height, midpoint, width):
    return level + height * expit(2 * np.log(9) * (at - midpoint) / np.exp(width))


def _logistic_fit(at, value, start):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)
        try:
            return curve_fit(_logistic, at, value, p0=start, maxfev=200)[0]
        except RuntimeError:
            return np.asarray(start)


if __name__ == "__main__":
    main()
