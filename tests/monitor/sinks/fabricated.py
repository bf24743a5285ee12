"""Measurements that nobody measured: two small declarations, and rows whose values say where they
belong (`step + attempt / 100` in every score), for the tests of what records them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from monitor.record import HEAD, LAYER, Failure, Field, Measurement, Moment, ProbeSpec, Reading

START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)

HEADS = ProbeSpec(
    name="heads",
    help="Made-up scores of heads.",
    source="Nobody 2024",
    dims=(LAYER, HEAD),
    fields=(
        Field(name="score", help="A made-up score.", low=0, high=1, null="chance alone"),
        Field(name="entropy", help="A made-up entropy.", unit="nats", stderr=False),
    ),
    needs=(),
)
LOSSES = ProbeSpec(
    name="losses",
    help="Made-up losses.",
    source="Nobody 2025",
    dims=(),
    fields=(
        Field(name="loss", help="A made-up loss.", unit="nats"),
        Field(name="by_position", help="One a position.", stderr=False, per="position"),
    ),
    needs=(),
)


def moment(step: int, *, run: str = "r", attempt: int = 1, tokens: int | None = None) -> Moment:
    """Step `step` of a run in which every step takes a second."""
    time = START + timedelta(seconds=step)
    return Moment(run=run, attempt=attempt, step=step, tokens=tokens, time=time)


def nothing_told(spec: ProbeSpec) -> dict[str, None]:
    """Every column of the fields of `spec`, as of what was not measured."""
    return dict.fromkeys(column for field in spec.fields for column in field.columns)


def heads(
    when: Moment,
    *,
    layers: int = 2,
    heads: int = 2,
    score: Sequence[float] | np.ndarray | None = None,
    validity: Sequence[str] | None = None,
    spec: ProbeSpec = HEADS,
) -> Reading:
    """A row for each head; every score is `step + attempt / 100` unless `score` says otherwise."""
    rows = layers * heads
    score = np.full(rows, when.step + when.attempt / 100) if score is None else np.asarray(score)
    columns = {
        "layer": np.repeat(np.arange(layers), heads),
        "head": np.tile(np.arange(heads), layers),
        "score": score,
        "score_stderr": np.full(rows, 0.125),
        "score_null": np.full(rows, 0.25),
        "entropy": np.arange(rows) / 8,
        "n": np.full(rows, 16),
        "validity": ["ok"] * rows if validity is None else validity,
    }
    return Reading.build(spec, when, columns)


def losses(when: Moment, *, loss: float = 2.5) -> Reading:
    """One row without dimensions, with a list in it."""
    columns = {
        "loss": [loss],
        "loss_stderr": [0.5],
        "by_position": [[3.0, 2.0, 1.0]],
        "n": [16],
        "validity": ["ok"],
    }
    return Reading.build(LOSSES, when, columns)


def failure(part: str) -> Failure:
    """A failure of `part`, with a traceback."""
    try:
        raise RuntimeError(f"{part} is broken")
    except RuntimeError as error:
        return Failure.of(part, error)


def measurement(
    step: int, *, run: str = "r", attempt: int = 1, failures: Sequence[str] = ()
) -> Measurement:
    """Both tables at one step."""
    when = moment(step, run=run, attempt=attempt, tokens=100 * step)
    return Measurement(
        moment=when,
        readings=(heads(when), losses(when)),
        failures=tuple(map(failure, failures)),
        seconds={"heads": 0.5, "losses": 0.25},
    )
