"""Measurements of one made-up number that goes from 0 to 1 at some step, or does not; and what
might be said of it.
"""

from __future__ import annotations

import numpy as np

from monitor.detection import Notice, Series
from monitor.detection.table import Kind
from monitor.probes import parameters
from monitor.record import Field, Measurement, Moment, ProbeSpec, Reading
from monitor.transitions import Event
from monitor.transitions.online import State
from tests.monitor.sinks.fabricated import moment

SPEC = ProbeSpec(
    name="made_up",
    help="A made-up number.",
    source="Nobody 2026",
    dims=(),
    fields=(Field(name="number", help="Made up."),),
    needs=(),
)
NUMBER = Series.best("number", "made_up", "number")


def measured(step: int, value: float, *, run: str = "r", stderr: float = 0.01) -> Measurement:
    """One measurement of the number."""
    when = moment(step, run=run)
    columns = {"number": [value], "number_stderr": [stderr], "n": [16], "validity": ["ok"]}
    return Measurement(moment=when, readings=(Reading.build(SPEC, when, columns),))


def rising(
    *,
    at: int = 40,
    measurements: int = 60,
    every: int = 10,
    height: float = 1.0,
    stderr: float = 0.01,
) -> list:
    """Noise of sd 0.05, which goes up within few measurements of the one numbered `at`."""
    random = np.random.default_rng(0)
    number = np.arange(measurements)
    values = height / (1 + np.exp(-2 * (number - at))) + 0.05 * random.normal(size=measurements)
    return [
        measured(every * step, value, stderr=stderr) for step, value in enumerate(values.tolist())
    ]


def notice(
    state: State,
    step: int,
    onset: int,
    series: str = "number",
    *,
    kind: Kind = "change",
    label: str = "",
) -> Notice:
    """What might be said of a series."""
    event = Event(
        series=series,
        state=state,
        direction="up",
        step=step,
        onset=onset,
        score=9.0,
        threshold=5.0,
    )
    return Notice(
        event=event,
        kind=kind,
        detected_at=onset,
        fitted=None,
        n=9,
        searched=1,
        false_alarms=1.0,
        label=label,
    )


def weights(when: Moment, digest: str, sketch: list[float]) -> Reading:
    """The table that says which weights were measured."""
    columns = {
        "norm": [1.0],
        "norm_stderr": [0.0],
        "norm_null": [0.0],
        "digest": [digest],
        "sketch": [sketch],
        "n": [9],
        "validity": ["ok"],
    }
    return Reading.build(parameters.SPEC, when, columns)
