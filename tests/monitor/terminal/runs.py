"""Runs that nobody trained: tables of the real probes with made-up values, from a real sink."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from monitor.detection.table import SPEC as TRANSITIONS
from monitor.probes.circuit import SPEC as CIRCUIT
from monitor.probes.concepts import SPEC as CONCEPTS
from monitor.probes.in_context import SPEC as IN_CONTEXT
from monitor.probes.induction import SPEC as INDUCTION
from monitor.record import Measurement, Moment, Reading
from monitor.sinks import ParquetSink
from tests.monitor.sinks.fabricated import nothing_told

NULL = 0.02


def _reading(spec, when, columns):
    rows = len(columns["validity"])
    empty = {name: [value] * rows for name, value in nothing_told(spec).items()}
    return Reading.build(spec, when, empty | {"n": [16] * rows} | columns)


def _said(when):
    columns = {
        "series": ["induction head formed"],
        "state": ["provisional" if when.step == 300 else "confirmed"],
        "direction": ["up"],
        "kind": ["formation"],
        "label": [""],
        "began": [300.0],
        "detected_at": [300.0],
        "validity": ["ok"],
    }
    return _reading(TRANSITIONS, when, columns)


def measurement(step, run, *, circuit="ok"):
    """At step 300 head 1.0 begins to be an induction head, by a tenth at each hundred steps."""
    at = datetime.now(UTC) - timedelta(seconds=600 - step)
    when = Moment(run=run, attempt=1, step=step, tokens=100 * step, time=at)
    score = NULL + max(0, step - 200) / 1_000  # the highest from step 300 on
    heads = {
        "layer": [0, 0, 1, 1],
        "head": [0, 1, 0, 1],
        "prefix_matching": [NULL + 0.05, NULL + 0.05, score, 0.9],
        "prefix_matching_stderr": [0.01] * 4,
        "prefix_matching_null": [NULL] * 4,
        "previous_token": [0.8, 0.1, 0.1, 0.1],
        "previous_token_stderr": [0.01] * 4,
        "previous_token_null": [0.03] * 4,
        "validity": ["ok", "ok", "ok", "not finite"],
    }
    losses = {
        "loss_late": [5.0 - step / 200],
        "loss_late_stderr": [0.1],
        "loss_late_null": [6.24],
        "paired_score": [-score],
        "paired_score_stderr": [0.05],
        "paired_score_null": [0.0],
        "validity": ["ok"],
    }
    concepts = {
        "layer": [0, 1, 0],
        "concept": ["comment", "comment", "string"],
        "method": ["diff_in_means"] * 3,
        "auc": [0.9, 0.8, 0.55],
        "auc_stderr": [0.02, 0.02, 0.04],
        "auc_null": [0.5] * 3,
        "validity": ["ok"] * 3,
    }
    edges = {
        "source_layer": [0, 1],
        "source_head": [0, 0],
        "target_layer": [1, -1],
        "target_head": [0, -1],
        "kind": ["k", "logits"],
        "claim": ["attribution"] * 2,
        "causal_test": ["failed"] * 2,
        "validity": [circuit] * 2,
    }
    readings = [
        _reading(INDUCTION, when, heads),
        _reading(IN_CONTEXT, when, losses),
        _reading(CONCEPTS, when, concepts),
        _reading(CIRCUIT, when, edges),
        *([_said(when)] if step in (300, 400) else []),
    ]
    return Measurement(
        moment=when, readings=tuple(readings), failures=(), seconds={"induction": 0.5}
    )


def record(root, *steps, run="r", **more):
    sink = ParquetSink(root, run)
    for step in steps:
        sink.write(measurement(step, run, **more))
    sink.close()
