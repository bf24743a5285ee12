"""How often transitions are claimed as they happen where there are none, and how soon where there
is one, beside a plain CUSUM and, afterwards, PELT.

`make bench-transitions` prints it after what `tests.benchmarks.transitions` does, or with
`ARGS="--trials 100"` for more series than 20 of each kind. How the threshold was chosen:

    .venv/bin/python -m tests.benchmarks.online_transitions --calibration --trials 100
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import ruptures
from rich.console import Console
from rich.table import Table
from scipy.signal import lfilter
from scipy.stats import chi2, norm

from monitor.transitions import OnlineDetector
from monitor.transitions.evidence import WINDOW, strongest
from monitor.transitions.online import threshold
from tests.trajectories import NOISES, NULLS, noise, null, sigmoid

LENGTH = 200
MIDPOINT = 110
HEIGHTS = (5, 10)
WIDTHS = (1, 5, 9, 20, 40)
SERIES = 20
"""Series of a run that share its rate, in the column of that name."""

_RESTART = 100
# An alarm from so long before the midpoint, in widths, is of the transition.
_EARLY = 1.0
# Measurements after the midpoint within which half are to be found.
_SOON = 3
# Noise that `tests.trajectories` does not have, on a level.
_OTHERS = ("walk", "small", "growing", "drift", "smooth")

Alarms = list[list[int]]


def table(trials: int) -> Table:
    """Alarms in 1,000 measurements without a transition, with 95% intervals, and how many of the
    transitions were found, how many measurements after their midpoint in the median.

    Where one of 20 series of a run is looked at, its share of the rate is a twentieth, and the
    alarms are those of all 20. PELT sees the whole series. No detector finds more at this rate than
    the last two columns say, 3 measurements after the midpoint and at last: these know the form,
    the midpoint and the noise beforehand.
    """
    printed = Table(title=f"Transitions as they happen, {trials} series of {LENGTH} for each row")
    detectors = ("provisional", "confirmed", f"of {SERIES} series", "CUSUM", "PELT")
    for column in ("", *detectors, f"bound, +{_SOON}", "bound"):
        printed.add_column(column, justify="right" if column else "left")
    for row in (*_without(trials), *_with(trials)):
        printed.add_row(*row)
    return printed


def calibration(trials: int) -> Table:
    """By how much the highest score of a series passes the threshold, in each kind of null.

    At 1 in 1,000 the 80% quantile of series of 200 measurements may be 0, at 0.05 the 99%, and of
    their first 40 the 96%. Level, slopes, window, and the charges in `noises` were chosen on 50 to
    150 series of each kind, with other seeds than those of `table`, and on the recorded trainings,
    of which those where something forms were to lie above those where not.
    """
    printed = Table(title=f"Highest score less its threshold, {trials} series of {LENGTH} each")
    for column in ("", "80% at 1", "its first 40", "99% at 0.05"):
        printed.add_column(column, justify="right" if column else "left")
    for kind, of in _kinds():
        if kind == "restart":
            continue
        excess = _excess(_nulls(kind, of, trials, seed=7))
        lower = threshold(1 / SERIES, WINDOW) - threshold(1, WINDOW)
        printed.add_row(
            f"{kind}, {of}",
            f"{np.quantile(excess.max(axis=0), 0.8):+.2f}",
            f"{np.quantile(excess[:40].max(axis=0), 0.96):+.2f}",
            f"{np.quantile(excess.max(axis=0) - lower, 0.99):+.2f}",
        )
    return printed


def claims(
    values: np.ndarray, *, rate: float = 1.0, restart: int | None = None
) -> tuple[Alarms, Alarms]:
    """Where changes of each series, one a column, were provisional, and where confirmed.

    Each has the rate for itself: together they have as many times more.
    """
    detector = OnlineDetector(rate * values.shape[1])
    for step, row in enumerate(values):
        if step == restart:
            detector.break_chain(step)
        detector.update(step, {str(at): number for at, number in enumerate(row)})
    found: dict[str, Alarms] = {
        state: [[] for _ in values.T] for state in ("provisional", "confirmed", "retracted")
    }
    for event in detector.history:
        found[event.state][int(event.series)].append(int(event.step))
    return found["provisional"], found["confirmed"]


def cusum(value: np.ndarray, burn_in: int = 20, slack: float = 0.5, limit: float = 5.0):
    """Page 1954, two-sided, on a mean and deviation from a burn-in; begins anew after an alarm."""
    alarms, begun = [], 0
    up = down = 0.0
    for at in range(len(value)):
        if at - begun < burn_in:
            continue
        if at - begun == burn_in:
            before = value[begun:at]
            mean, deviation = before.mean(), before.std(ddof=1) or 1.0
            up = down = 0.0
        z = (value[at] - mean) / deviation
        up, down = max(0.0, up + z - slack), max(0.0, down - z - slack)
        if max(up, down) > limit:
            alarms.append(at)
            begun = at + 1
    return alarms


def pelt(value: np.ndarray) -> list[int]:
    """Killick 2012: changes of the mean of a finished series, with the penalty of BIC."""
    spread = np.median(np.abs(np.diff(value))) * 1.4826 / np.sqrt(2) or 1.0
    # PELT in C: with this kernel its cost is that of changes of the mean.
    found = ruptures.KernelCPD(kernel="linear", min_size=2).fit(value / spread)
    return found.predict(pen=3 * np.log(len(value)))[:-1]


def bound(of: str, height: float, width: float, last: int) -> float:
    """How often a matched filter that knows all but a parabola beside the transition, and its sign,
    passes the quantile of 1 in 1,000, given all until `last`.
    """
    rho = float(of.removeprefix("ar")) if of.startswith("ar") else 0.0
    curve = sigmoid(LENGTH, midpoint=MIDPOINT, width=width, height=height)[: last + 1]
    columns = np.column_stack([np.vander(np.linspace(-1, 1, last + 1), 3), curve])
    whitened = np.vstack([columns[:1], (columns[1:] - rho * columns[:-1]) / np.sqrt(1 - rho**2)])
    strength = abs(np.linalg.qr(whitened)[1][-1, -1])
    if of == "heavy":
        # Fisher's information on the location of Student's t, with 3 degrees and variance 1, is 2.
        strength *= np.sqrt(2)
    return float(norm.cdf(strength - norm.ppf(1 - 1 / 2000)))


def _kinds() -> Iterator[tuple[str, str]]:
    yield from ((kind, of) for kind in NULLS for of in NOISES)
    yield from (("flat", of) for of in _OTHERS)
    yield from (("decay", "small"), ("restart", "white"), ("restart", "ar0.9"))


def _without(trials: int) -> Iterator[tuple[str, ...]]:
    for kind, of in _kinds():
        values = _nulls(kind, of, trials, seed=1)
        restart = _RESTART if kind == "restart" else None
        counts = [sum(map(len, alarms)) for alarms in _all(values, restart=restart)]
        each = np.array([1, 1, SERIES, 1, 1]) * 1000 / values.size
        yield (f"{kind}, {of}", *map(_interval, counts, each), "", "")


def _with(trials: int) -> Iterator[tuple[str, ...]]:
    for of in NOISES:
        for height in HEIGHTS:
            for width in WIDTHS:
                rng = np.random.default_rng(2)
                curve = sigmoid(LENGTH, midpoint=MIDPOINT, width=width, height=height)
                signs = rng.choice([-1, 1], trials)
                values = np.column_stack([noise(of, LENGTH, rng) + sign * curve for sign in signs])
                shares = (_share(alarms, width) for alarms in _all(values))
                ends = (MIDPOINT + _SOON, _last(width))
                best = (f"{bound(of, height, width, end):.0%}" for end in ends)
                yield f"{height} high, {width} wide, {of}", *shares, *best


def _all(values: np.ndarray, restart: int | None = None) -> tuple[Alarms, ...]:
    return (
        *claims(values, restart=restart),
        claims(values, rate=1 / SERIES, restart=restart)[0],
        [cusum(value) for value in values.T],
        [pelt(value) for value in values.T],
    )


def _last(width: float) -> int:
    return int(MIDPOINT + width + 20)


def _share(alarms: Alarms, width: float) -> str:
    """Of series with an alarm that is of the transition; how long after the midpoint it was."""
    first = MIDPOINT - _EARLY * width - 2
    delays = [
        next((at - MIDPOINT for at in each if first <= at <= _last(width)), None) for each in alarms
    ]
    found = [delay for delay in delays if delay is not None]
    return f"{len(found) / len(alarms):.0%}, {np.median(found):+.0f}" if found else "0%"


def _interval(count: int, each: float) -> str:
    """A rate with the exact 95% interval of a Poisson count."""
    low = chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    high = chi2.ppf(0.975, 2 * count + 2) / 2
    return f"{count * each:.2f} ({low * each:.2f}–{high * each:.2f})"


def _nulls(kind: str, of: str, trials: int, *, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([_null(kind, of, rng) for _ in range(trials)])


def _null(kind: str, of: str, rng: np.random.Generator) -> np.ndarray:
    """Noise that nothing in `tests.trajectories` has: a random walk; white, and a thousandth of the
    height of curves; white, and growing to ten times what it was; white on top of a random walk of
    a quarter of its size; autoregressive of second order. A restart is a new level, at a step at
    which the detector is told that the chain is broken.
    """
    curve = np.zeros(LENGTH)
    if kind == "restart":
        curve[_RESTART:] = rng.uniform(-20, 20)
    else:
        curve = null(kind, LENGTH, rng)
    if of in NOISES:
        return curve + noise(of, LENGTH, rng)
    white = rng.standard_normal(LENGTH)
    match of:
        case "walk":
            return curve + np.cumsum(white)
        case "small":
            return curve + white / 1000
        case "growing":
            return curve + white * np.linspace(0.1, 1, LENGTH)
        case "drift":
            return curve + white + np.cumsum(rng.standard_normal(LENGTH)) / 4
    burn_in = rng.standard_normal(LENGTH)
    return curve + lfilter([1], [1, -1.5, 0.54], np.append(burn_in, white))[LENGTH:]


def _excess(values: np.ndarray) -> np.ndarray:
    """Of each measurement and series the score less the threshold at 1 in 1,000."""
    step, excess = np.arange(len(values), dtype=float), np.full(values.shape, -np.inf)
    zeros, nowhere = np.zeros_like(values), np.zeros(values.shape[1], dtype=int)
    anything = np.zeros(values.shape[1])
    for end in range(1, len(values) + 1):
        of = slice(max(0, end - WINDOW), end)
        found = strongest(step[of], values[of], zeros[of], nowhere, anything)
        excess[end - 1] = found.score - threshold(1, min(end, WINDOW))
    return excess


def cost(series: int) -> float:
    """Milliseconds for one measurement of one series, of so many at once, with a full window."""
    rng, detector = np.random.default_rng(3), OnlineDetector()
    begun = 0.0
    for step, row in enumerate(rng.standard_normal((LENGTH, series))):
        if step == WINDOW + 1:
            begun = time.process_time()
        detector.update(step, {str(at): number for at, number in enumerate(row)})
    return 1000 * (time.process_time() - begun) / (series * (LENGTH - WINDOW - 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-transitions", description=__doc__)
    parser.add_argument("--trials", type=int, default=20, help="series of each kind")
    parser.add_argument("--calibration", action="store_true", help="how the threshold was chosen")
    options = parser.parse_args()
    console = Console(width=140)
    console.print((calibration if options.calibration else table)(options.trials))
    for series in (1, 20, 200):
        console.print(f"{cost(series):.2f} ms for a measurement of each of {series} series")


if __name__ == "__main__":
    main()
