"""A run that is played to Prometheus: what real measurements of small models in training gave.

No single model that is small enough has all there is to measure. A transformer with neurons is
trained on text for most tables; an induction circuit was planted in one, whose heads are ablated;
one is asked sums, which is a task; one has computed a feature. Each table is that of the model in
which there is most of it.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import torch
import torch.nn.functional as F

from monitor import transitions
from monitor.detection import table
from monitor.measure import Monitor
from monitor.probes import OPTIONAL, PROBES, superposition
from monitor.record import Failure, Measurement, Moment, Reading
from monitor.tasks import ModularAddition
from tests.models import PlantedCircuit, gpt2
from tests.models.concepts import CONCEPTS, RELATION
from tests.models.sums import ShortTransformer, random_pairs
from tests.models.toy_superposition import PlantedXor
from tests.monitor.detection.made_up import notice
from tests.monitor.features.test_readable import labelled
from tests.monitor.probes.test_superposition import directions, seen
from tests.trajectories import noise, sigmoid

# At the second the gradient still says more than its noise.
STEPS = (0, 20, 200)

# Whose tables these are; all others are those of the transformer that is trained on text.
OF_CIRCUIT = ("ablation", "circuit", "heads")


def measurements() -> list[Measurement]:
    """One measurement for each of `STEPS`, without its run and time."""
    whole = []
    for of_text, of_circuit, of_sums in zip(_trained(), _planted(), _asked_sums(), strict=True):
        readings = {reading.spec.name: reading for reading in of_text.readings}
        for reading in (*of_circuit.readings, *of_sums.readings):
            readings[reading.spec.name] = reading
        readings["superposition"] = _computed(of_text.moment)
        if state := {20: "provisional", 200: "confirmed"}.get(of_text.moment.step):
            readings["transitions"] = _said(of_text.moment, state)
        failed = (Failure(part="heads", error="RuntimeError: made up", traceback=""),)
        whole.append(replace(of_text, readings=tuple(readings.values()), failures=failed))
    return whole


def now(measurement: Measurement, run: str, *, later: int = 0) -> Measurement:
    """The measurement as one of a run, and of now, so many steps later."""
    step = measurement.moment.step + later
    moment = replace(measurement.moment, run=run, step=step, time=datetime.now(UTC))
    readings = tuple(_at(reading, moment) for reading in measurement.readings)
    return replace(measurement, moment=moment, readings=readings)


def _at(reading: Reading, moment: Moment) -> Reading:
    columns = reading.table.to_pydict()
    return Reading.build(reading.spec, moment, columns)


def _trained() -> list[Measurement]:
    """A transformer that learns a text by heart: its weights come near a minimum of that loss."""
    names = [probe.spec.name for probe in (*PROBES, *OPTIONAL)]
    names = [name for name in names if name not in (*OF_CIRCUIT, "grokking")]
    torch.manual_seed(0)
    model, tokens = gpt2(activation_function="relu"), torch.randint(48, (24, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    told, loss = [], None
    with Monitor(
        None, run="r", text=tokens, concepts=(*CONCEPTS, RELATION), probes=names, sequences=6
    ) as watch:
        watch.watch(optimizer, every=STEPS[1])
        for step in range(STEPS[-1] + 1):
            if step in STEPS:
                told.append(
                    watch.measure(model, step, step * tokens.numel(), seconds=torch.inf, loss=loss)
                )
            optimizer.zero_grad()
            # In micro-batches, which say how noisy the gradient is.
            for part in tokens.split(4):
                logits = model(part).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
                (loss / 6).backward()
            optimizer.step()
    return told


def _planted() -> list[Measurement]:
    torch.manual_seed(1)
    text = torch.randint(40, (12, 24))
    with Monitor(None, run="r", text=text, probes=list(OF_CIRCUIT), sequences=6) as watch:
        told = watch.measure(PlantedCircuit(), 0, seconds=torch.inf)
    readings = tuple(r for r in told.readings if r.spec.name in OF_CIRCUIT)
    # Its weights stay as they are.
    return [replace(told, readings=readings)] * len(STEPS)


def _asked_sums() -> list[Measurement]:
    p = 11
    task = ModularAddition(p, train=random_pairs(p), keys=[1, 2])
    torch.manual_seed(2)
    with Monitor(None, run="r", task=task, probes=["grokking"], sequences=6) as watch:
        return [watch.measure(ShortTransformer(p), step, seconds=torch.inf) for step in STEPS]


def _computed(moment: Moment) -> Reading:
    """Of a layer that computes whether one of two features is there and the other is not."""
    told = directions(torch.eye(3).expand(3, 3, 3))
    columns = superposition.compute(seen(PlantedXor(), labelled(), told))
    return Reading.build(superposition.SPEC, moment, columns)


def _said(moment: Moment, state: str) -> Reading:
    """What is said of a series that rose, and of one of which no fit is clear."""
    step = np.arange(80) * 10.0
    rise = sigmoid(80, midpoint=40, width=8, height=20) + noise(
        "white", 80, np.random.default_rng(0)
    )
    (fitted,) = transitions.fit(step, rise)
    clear = replace(notice(state, moment.step, moment.step - 5, "clear"), fitted=fitted)
    return table.reading([clear, notice(state, moment.step, moment.step - 5, "other")], moment)
