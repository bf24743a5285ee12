"""A recorded training, measured once more: real declarations, the numbers of one of the
trajectories, and what the project's own detector says of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from monitor.detection import Noticing, reading
from monitor.probes import (
    circuit,
    concepts,
    heads,
    in_context,
    induction,
    neurons,
    superposition,
    top_neurons,
)
from monitor.record import Measurement, Moment, ProbeSpec, Reading
from tests.monitor.sinks.fabricated import moment
from tests.trajectories import recorded

EVIL = "<img src=x onerror=alert(1)>"
"""What a concept may be called."""

LAYERS, HEADS = 2, 3


def filled(spec: ProbeSpec, when: Moment, rows: int, **given: Any) -> Reading:
    """A table of so many rows, in which what is not given is made up of numbers near a half."""
    random = np.random.default_rng([when.step, len(spec.name)])
    columns: dict[str, Any] = {"n": np.full(rows, 16), "validity": ["ok"] * rows}
    for field in spec.fields:
        if field.text:
            columns[field.name] = ["none"] * rows
        elif field.per:
            columns[field.name] = None
        else:
            columns |= dict.fromkeys(field.columns, np.full(rows, 0.02))
            columns[field.name] = 0.5 + 0.02 * random.normal(size=rows)
    return Reading.build(spec, when, columns | given)


def _heads(when: Moment, row: Any) -> list[Reading]:
    """Head 1.0 is the recorded best one; at first one head cannot be judged."""
    layer, head = np.repeat(np.arange(LAYERS), HEADS), np.tile(np.arange(HEADS), LAYERS)
    best = (layer == 1) & (head == 0)
    validity = np.where((head == 2) & (when.step < 100), "too few tokens", "ok")
    score = np.where(best, row["max_ind"], 0.02 + 0.001 * np.arange(len(layer)))
    where = {"layer": layer, "head": head}
    before = np.where((layer == 0) & (head == 1), row["max_prev"], 0.03)
    return [
        filled(
            induction.SPEC, when, len(layer), **where,
            prefix_matching=score, prefix_matching_stderr=np.full(len(layer), 0.01),
            prefix_matching_null=np.full(len(layer), 0.05), beyond_position=score - 0.05,
            beyond_position_stderr=np.full(len(layer), 0.01), previous_token=before,
            previous_token_null=np.full(len(layer), 0.05), validity=validity,
        ),
        filled(
            heads.SPEC, when, len(layer), **where, excess=score,
            label=np.where(best, "induction", "none"), claim=np.where(best, "causal", "none"),
        ),
    ]  # fmt: skip


def _circuit(when: Moment) -> Reading:
    if when.step < 300:
        none = {"kind": ["none"], "validity": ["no induction head"]}
        absent = [-1]
        return filled(
            circuit.SPEC, when, 1, source_layer=absent, source_head=absent, target_layer=absent,
            target_head=absent, **none,
        )  # fmt: skip
    return filled(
        circuit.SPEC, when, 2, source_layer=[0, 1], source_head=[1, 0], target_layer=[1, -1],
        target_head=[0, -1], kind=["k", "logits"], claim=["induction circuit"] * 2,
        causal_test=["passed"] * 2, key_composition=[0.5, None], contrast=[None, 2.0],
    )  # fmt: skip


def measurements(run: str = "r", name: str = "blocks_2L_s0") -> Iterator[Measurement]:
    """The measurements of a run, with what is noticed as it goes on."""
    noticing = Noticing()
    for row in recorded(name).to_dict("records"):
        when = moment(int(row["step"]), run=run, tokens=int(row["tokens"]))
        of_text = {name: [row[name]] for name in ("loss_early", "loss_late")}
        of_copies = {"repeat_first": [row["rep_loss_1st"]], "repeat_later": [row["rep_loss_2nd"]]}
        losses = filled(
            in_context.SPEC, when, 1, **of_text, **of_copies, score=[row["icl"]],
            paired_score=[row["icl"]],
        )  # fmt: skip
        layers = np.repeat(np.arange(-1, LAYERS), 2)
        readings = (
            *_heads(when, row),
            losses,
            _circuit(when),
            filled(
                concepts.SPEC, when, len(layers), layer=layers,
                concept=[EVIL, "capital"] * (LAYERS + 1), method=["diff_in_means"] * len(layers),
            ),
            filled(superposition.SPEC, when, LAYERS, layer=range(LAYERS)),
            filled(neurons.SPEC, when, LAYERS, layer=range(LAYERS)),
            filled(top_neurons.SPEC, when, 2, layer=[0, 1], neuron=[7, 3], label=[EVIL, ""]),
        )  # fmt: skip
        one = Measurement(moment=when, readings=readings)
        noticed = noticing.notice(one).notices
        said = (reading(noticed, when),) if noticed else ()
        yield dataclasses.replace(one, readings=(*readings, *said))
