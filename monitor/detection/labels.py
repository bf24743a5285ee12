"""What happened in the training itself around a step, which may explain a transition there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import duckdb

# By how much the learning rate must have fallen, and rise again.
_FACTOR = 2.0
# A value stands out of so many before it, where there are at least so many.
_BEFORE, _FEWEST = 20, 8
# By so many standard deviations of how far these scatter, and at least by so much: of the loss a
# tenth, of gradients, which scatter more, threefold.
_DEVIATIONS = 10.0
_LOSS_RISE, _GRADIENT_FACTOR = 0.1, 3.0
# What happened so many measurements before a transition begins may have begun it.
_NEAR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training showed at one measurement; None: not known."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None


def trained_until(connection: duckdb.DuckDBPyConnection) -> list[Trained]:
    """What the tables of a connection say of training, in the order of the steps; nothing where it
    was not measured.
    """
    kept = "|".join(field.name for field in fields(Trained))
    # Of the numbers those that there are: not all may have been asked for.
    query = f"select columns('^({kept})$') from optimisation where family = 'all' order by step"  # noqa: S608 -- ours
    try:
        found = connection.execute(query)
    except duckdb.CatalogException:
        return []
    names = [column[0] for column in found.description or ()]
    return [Trained(**dict(zip(names, row, strict=True))) for row in found.fetchall()]


def label(trained: Sequence[Trained], *, onset: float, until: float) -> str:
    """What happened between shortly before step `onset` and step `until`, as far as measurements
    (in the order of their steps) show it; empty for nothing.

    >>> rates = [1e-3, 8e-4, 5e-4, 2e-4, 1e-4, 1e-3, 9e-4]
    >>> trained = [Trained(step=100 * i, learning_rate=rate) for i, rate in enumerate(rates)]
    >>> label(trained, onset=480.0, until=600.0)
    'the learning rate restarts at step 500'
    >>> label(trained, onset=100.0, until=300.0)
    ''

    A restart is a learning rate that rises twofold and more after it fell to a half or below:
    warming up is none. A loss spikes, and a gradient norm jumps, where it is far above the 20
    measurements before. What passes between two measurements is not seen; and what happens at the
    same time need not be the cause.
    """
    before = [one.step for one in trained if one.step <= onset][-1 - _NEAR :]
    first = before[0] if before else onset
    found = [*_restarts(trained), *_outliers(trained)]
    near = [(step, said) for step, said in sorted(found) if first <= step <= until]
    by_kind = {said: step for step, said in reversed(near)}
    return "; ".join(
        f"{said} at step {step:,}" for said, step in sorted(by_kind.items(), key=lambda it: it[1])
    )


def _restarts(trained: Sequence[Trained]) -> Iterator[tuple[int, str]]:
    highest, lowest = 0.0, math.inf
    for one in trained:
        rate = one.learning_rate
        if rate is None or not math.isfinite(rate):
            continue
        risen = min(highest, rate)
        if restarts := risen > 0 and risen >= _FACTOR * lowest:
            yield one.step, "the learning rate restarts"
        if restarts or rate >= highest:
            highest, lowest = rate, rate
        lowest = min(lowest, rate)


def _outliers(trained: Sequence[Trained]) -> Iterator[tuple[int, str]]:
    losses = [(one.step, one.loss) for one in trained]
    for step, above, usual in _rises(losses):
        if above > _LOSS_RISE * abs(usual):
            yield step, "the loss spikes"
    logs = [
        (one.step, math.log(one.gradient_norm))
        for one in trained
        if one.gradient_norm is not None and 0 < one.gradient_norm < math.inf
    ]
    for step, above, _ in _rises(logs):
        if above > math.log(_GRADIENT_FACTOR):
            yield step, "the gradient norm jumps"


def _rises(values: Sequence[tuple[int, float | None]]) -> Iterator[tuple[int, float, float]]:
    """Where a value is far above those before: the step, by how much, and their median."""
    known = [(step, v) for step, v in values if v is not None and math.isfinite(v)]
    for place in range(_FEWEST, len(known)):
        step, value = known[place]
        before = [v for _, v in known[max(0, place - _BEFORE) : place]]
        # The latest few, so that a loss that rises slowly does not stand out.
        usual = statistics.median(before[-_FEWEST:])
        scatter = 1.4826 * statistics.median(abs(v - statistics.median(before)) for v in before)
        if value - usual > _DEVIATIONS * scatter:
            yield step, value - usual, usual
