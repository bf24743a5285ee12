"""`ablation` in the time that it is given, on models that fail, and beside a training: its stages
are made whole or not at all, and change nothing.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from monitor.ablating import Ablation
from monitor.measure import Monitor, measure
from monitor.probes import ablation, select
from monitor.record import Measurement
from monitor.subject import Subject
from tests.models import PlantedCircuit
from tests.monitor.probes.test_ablation import NOW, evidence_of, rows, subject_of, text_of
from tests.monitor.test_untouched import trained


def at(subject: Subject, seconds: float | None) -> Measurement:
    return subject.measure(select(["ablation"]), NOW, seconds=seconds)


def test_without_time_there_is_no_reading_and_no_failure():
    subject = subject_of(PlantedCircuit())
    measurement = at(subject, 0.0)
    assert (measurement.readings, measurement.failures) == ((), ())
    assert measurement.intervening == 0


def test_a_stage_is_made_whole_or_not_at_all():
    subject = subject_of(PlantedCircuit())
    whole = at(subject, None).frame("ablation")
    # An induction head and four random ones, to zero and to the mean, after one intact pass.
    least = 11 * subject.memory.spending.each
    first = None
    for share in (0.3, 1.5, 3.0):
        measurement = at(subject, share * least)
        if share < 0.7 and measurement.readings:
            pytest.fail("time for half of the first stage was taken to be enough")
        if measurement.readings:
            table = measurement.frame("ablation")
            first = len(table) if first is None else first
            assert len(table) >= first
            assert len(rows(table, "induction")) == len(rows(table, "induction", "mean")) == 1
            random = table["group"].str.startswith("random") & (table["method"] == "zero")
            assert random.sum() >= 4
    assert first is not None
    assert len(at(subject, 1e6).frame("ablation")) == len(whole)


def test_one_shot_and_monitor_take_the_seconds():
    model = PlantedCircuit()
    assert measure(model, probes=["ablation"], seconds=0) == {}
    with Monitor(None, probes=["ablation"], text=text_of(model, 24)) as watch:
        withheld = watch.measure(model, 0, seconds=0)
        assert (withheld.readings, withheld.intervening) == ((), 0)
        measurement = watch.measure(model, 1, seconds=math.inf)
        assert len(measurement.frame("ablation")) > 20
        assert 0 < measurement.intervening < watch.last_seconds


class Fragile(PlantedCircuit):
    """Breaks between its blocks at the last of so many passes."""

    def __init__(self):
        super().__init__()
        self.left = []

    def forward(self, tokens):
        residual = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        if self.left and not self.left.pop():
            raise RuntimeError("planted in the model")
        return self.unembedding(self.blocks[1](self.blocks[0](residual)))


def settle(watch: Monitor, model: nn.Module) -> None:
    """Its parts, without neurons, are looked for no more after some measurements."""
    for step in range(4):
        watch.measure(model, step, seconds=0)


def test_a_later_stage_that_fails_takes_nothing_from_the_first():
    model = Fragile()
    names = ["ablation", "heads", "circuit"]
    with Monitor(None, probes=names, text=text_of(model, 24)) as watch:
        settle(watch, model)
        stages = ablation.plan(evidence_of(PlantedCircuit(), text=text_of(model, 24)))
        observed, means = 3, 3
        first = sum(3 * one.passes for one in stages[0])
        model.left += [False, *[True] * (observed + means + first)]
        measurement = watch.measure(model, 4, seconds=1e6)
    (failure,) = measurement.failures
    assert (failure.part, failure.error) == ("ablation", "RuntimeError: planted in the model")
    # And what is said of it: that a circuit was there twice.
    assert [reading.spec.name for reading in measurement.readings] == [*names, "transitions"]
    table = measurement.frame("ablation")
    assert set(table["method"]) == {"zero", "mean"}, "with patterns kept it failed"
    assert {"induction", "random 4 of size 1", "previous_token", "head"} <= set(table["group"])
    causal = measurement.frame("heads").set_index(["layer", "head"])["causal_test"]
    assert causal[1, 0] == "passed"


def test_a_model_that_fails_when_ablated_is_a_failure_and_training_goes_on():
    model = Fragile()
    names = ["ablation", "in_context", "circuit"]
    with Monitor(None, probes=names, text=text_of(model, 24)) as watch:
        settle(watch, model)
        # It breaks after it was observed on three stimuli.
        model.left += [False, True, True, True, True]
        measurement = watch.measure(model, 4, seconds=1e6)
        (failure,) = measurement.failures
        assert (failure.part, failure.error) == ("ablation", "RuntimeError: planted in the model")
        assert [reading.spec.name for reading in measurement.readings] == ["in_context", "circuit"]
        assert set(measurement.frame("circuit")["causal_test"]) == {"not made"}
        assert 0 < measurement.intervening < watch.last_seconds
        assert watch.measure(model, 5, seconds=0).failures == ()


def test_training_is_the_same_bit_for_bit_with_interventions():
    def check(made: Measurement) -> None:
        assert made.frame("ablation")["repeat_later"].notna().all()

    text = torch.arange(64).view(2, 32) % 32
    with_it, without_it = (trained("ablation", text, steps=4, check=each) for each in (check, None))
    assert with_it == without_it


def test_ablations_say_how_many_passes_they_take():
    assert Ablation(heads=(), by="mean").passes == 1
    assert Ablation(heads=(), by="mean", patterns_kept=True).passes == 2
