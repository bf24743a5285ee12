"""Runs that nobody trained: tables with just the numbers of a scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from monitor.across import Claim, Passing
from monitor.attempt import attempt_row
from monitor.record import HEAD, LAYER, Field, Measurement, ProbeSpec, Reading
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import moment

SCORES = ProbeSpec(
    name="scores",
    help="Made-up scores.",
    source="Nobody 2026",
    dims=(LAYER, HEAD),
    fields=(
        Field(name="score", help="Made up.", null="chance"),
        Field(name="bare", help="Made up, without a null.", stderr=False),
    ),
    needs=(),
)
CLAIMS = ProbeSpec(
    name="circuit",
    help="Made-up claims.",
    source="Nobody 2026",
    dims=(),
    fields=(
        Field(name="claim", help="Made up.", text=True, stderr=False),
        Field(name="causal_test", help="Made up.", text=True, stderr=False),
    ),
    needs=(),
)
SCORED = Passing(name="scored", table="scores", field="score")
CAUSAL = Claim(name="causal", table="circuit", says="induction circuit")

NONE = float("nan")


def record_scores(
    root: Path,
    run: str,
    heads: Mapping[tuple[int, int], Sequence[float]],
    *,
    steps: Sequence[int] | None = None,
    tokens_a_step: int | None = 100,
    stderr: float | None = 0.01,
    null: float = 0.0,
    n: int = 16,
    validity: str = "ok",
    spec: ProbeSpec = SCORES,
) -> None:
    """A row for each head at every step; NaN and None are what was not measured."""
    sink = ParquetSink(root, run)
    length = len(next(iter(heads.values())))
    for at, step in enumerate(steps or range(0, 10 * length, 10)):
        tokens = None if tokens_a_step is None else tokens_a_step * step
        values = [None if value[at] != value[at] else value[at] for value in heads.values()]
        columns = {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            "score": values,
            "score_stderr": [None if value is None else stderr for value in values],
            "score_null": [null] * len(heads),
            "bare": [0.5] * len(heads),
            "n": [n] * len(heads),
            "validity": [validity] * len(heads),
        }
        when = moment(step, run=run, tokens=tokens)
        reading = Reading.build(spec, when, columns)
        sink.write(Measurement(moment=when, readings=(reading,)))


def record_claims(root: Path, run: str, *words: tuple[str | None, str | None]) -> None:
    """At steps 0, 10, … a row with what is claimed and how the test went."""
    sink = ParquetSink(root, run)
    for at, (claim, test) in enumerate(words):
        when = moment(10 * at, run=run, tokens=None)
        why = "no head attends as in an induction circuit" if claim == "none" else "ok"
        columns = {"claim": [claim], "causal_test": [test], "n": [16], "validity": [why]}
        reading = Reading.build(CLAIMS, when, columns)
        sink.write(Measurement(moment=when, readings=(reading,)))


def record_attempt(root: Path, run: str, *, seed: int, parameters: int) -> None:
    row = attempt_row(attempt=1, resumed_from=None, seed=seed, parameters=parameters, config={})
    ParquetSink(root, run).put("attempts", 1, row)


def one_head(*values: float) -> dict[tuple[int, int], Sequence[float]]:
    return {(0, 0): values}
