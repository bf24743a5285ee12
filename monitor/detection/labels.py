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
# What stands out again within so many measurements need not stand out as far.
_AGAIN, _DEVIATIONS_AGAIN = 4, 5.0
# What happened so many measurements before a transition begins may have begun it.
_NEAR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What training, and the loss on held-out text, were at one measurement; None: not known."""

    step: int
    loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    held_out: float | None = None


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
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    held_out = _held_out(connection)
    return [Trained(**row, held_out=held_out.get(row["step"])) for row in rows]


def _held_out(connection: duckdb.DuckDBPyConnection) -> dict[int, float]:
    """By step the loss on held-out text, where it was measured."""
    query = "select step, list_avg(loss_by_position) from in_context where validity = 'ok'"
    try:
        found = connection.execute(query).fetchall()
    except (duckdb.CatalogException, duckdb.BinderException):
        return {}
    return {step: loss for step, loss in found if loss is not None}


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
    measurements before. The data change where the training loss less that on held-out text is far
    from what it was there, and again soon after: what the weights alone do shows in both. It is
    said only of more than half of what held-out text shows at the same measurement, while the
    learning rate goes on (within twofold), and not of other data that are as hard; a training loss
    that falls so may be of data that come again. What passes between two measurements is not seen;
    and what happens at the same time need not be the cause.
    """
    before = [one.step for one in trained if one.step <= onset][-1 - _NEAR :]
    first = before[0] if before else onset
    data = list(_other_data(trained))
    # A loss that is higher with other data, and falls with them, is no spike.
    steps = [one.step for one in trained]
    higher = {step for at, _ in data for step in steps[steps.index(at) :][: 1 + _AGAIN]}
    spikes = [(step, "the loss spikes") for step in _spikes(trained) if step not in higher]
    found = [*_restarts(trained), *spikes, *_jumps(trained), *data]
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


def _spikes(trained: Sequence[Trained]) -> Iterator[int]:
    losses = [(one.step, one.loss) for one in trained]
    for step, above, usual, scatter in _against_those_before(losses):
        if above > max(_DEVIATIONS * scatter, _LOSS_RISE * abs(usual)):
            yield step


def _jumps(trained: Sequence[Trained]) -> Iterator[tuple[int, str]]:
    logs = [
        (one.step, math.log(one.gradient_norm))
        for one in trained
        if one.gradient_norm is not None and 0 < one.gradient_norm < math.inf
    ]
    for step, above, _, scatter in _against_those_before(logs):
        if above > max(_DEVIATIONS * scatter, math.log(_GRADIENT_FACTOR)):
            yield step, "the gradient norm jumps"


def _other_data(trained: Sequence[Trained]) -> Iterator[tuple[int, str]]:
    """Where the gap between both losses jumps, by more than half of what held-out text knows of it,
    and again soon after: a batch that is odd comes alone.
    """
    known = [one for one in trained if one.loss is not None and one.held_out is not None]
    gaps = [(one.step, (one.loss or 0.0) - (one.held_out or 0.0)) for one in known]
    held_out = [(one.step, one.held_out) for one in known]
    steady = _steady(trained)
    # Whether the gap is far from what it was, and whether that is due to other data, up or down.
    far, jumps = [False] * _FEWEST, [0] * _FEWEST
    for (step, by, _, scatter), (_, moved, usual, _) in zip(
        _against_those_before(gaps), _against_those_before(held_out), strict=True
    ):
        far.append(abs(by) > max(_DEVIATIONS_AGAIN * scatter, _LOSS_RISE * abs(usual)))
        due = far[-1] and abs(by) > abs(moved) / 2 and step in steady
        jumps.append(int(math.copysign(due, by)))
    for place, (one, jump) in enumerate(zip(known, jumps, strict=False)):
        new = jump != 0 and not any(far[max(0, place - _AGAIN) : place])
        if new and any(jumps[place + 1 : place + 1 + _AGAIN]):
            yield one.step, "the data change" if jump > 0 else "the data change, or come again,"


def _steady(trained: Sequence[Trained]) -> set[int]:
    """The steps at which the learning rate is near to what it was shortly before, or not known."""
    found = set()
    for place, one in enumerate(trained):
        rates = [each.learning_rate for each in trained[max(0, place - _NEAR) : place + 1]]
        known = [rate for rate in rates if rate is not None and math.isfinite(rate)]
        if not known or max(known) <= _FACTOR * min(known):
            found.add(one.step)
    return found


def _against_those_before(
    values: Sequence[tuple[int, float | None]],
) -> Iterator[tuple[int, float, float, float]]:
    """How a value lies to those before: its step, how far above their median, that, and how far
    they scatter.
    """
    known = [(step, v) for step, v in values if v is not None and math.isfinite(v)]
    for place in range(_FEWEST, len(known)):
        step, value = known[place]
        before = [v for _, v in known[max(0, place - _BEFORE) : place]]
        # The latest few, so that a loss that rises slowly does not stand out.
        usual = statistics.median(before[-_FEWEST:])
        scatter = 1.4826 * statistics.median(abs(v - statistics.median(before)) for v in before)
        yield step, value - usual, usual, scatter
