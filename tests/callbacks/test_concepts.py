"""Concepts in trainings under Lightning: named by the user they are stored with the run, from
enough held-out text, and by default there are none; in a run that goes on they are what they were.
"""

import json

import pytest
import torch

import monitor
from monitor.concepts import Concept, labelled_texts
from monitor.measure import Monitor
from monitor.stimuli import windows
from tests.callbacks.tiny import CONTEXT, LIGHTNING_WARNINGS, TinyLM, loader, text
from tests.models.concepts import CONCEPTS
from tests.recorded import attempt, stimulus

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

FRENCH = labelled_texts("french", having=[[1, 2, 3]] * 2 + [[1, 4]] * 2, lacking=[[5, 6]] * 4)


def labels(root):
    """Of each stored sequence, the labels by concept."""
    stored = monitor.read(root, "stimuli").query("stimulus == 'concepts'")
    return [dict(row) for row in stored["labels"]]


def raising(ids):
    raise AssertionError("a label function was called")


def test_concepts_are_stored_with_the_run(fit, dynamics, root):
    concepts = [*CONCEPTS, FRENCH]
    fit(dynamics(schedule=1, concepts=concepts), val=loader(text(40, seed=4)), max_steps=1)
    stored = labels(root)
    # Twice as many windows as there are sequences on which all else is measured, but one.
    assert len(stored) == 7 + 8
    assert all(list(row) == ["even", "third", "after_even", "french"] for row in stored)
    rows = torch.tensor(stimulus(root, "concepts"))
    even = torch.tensor([row["even"].tolist() for row in stored])
    assert (even[:7] != 0).sum() > 100
    assert ((even == 0) | (even == (rows % 2 == 0).int() * 2 - 1)).all()
    assert attempt(root)["config"]["concepts"]["even"] == "Has an even token id."


def test_by_default_there_is_text_without_concepts(fit, dynamics, root):
    held_out = text(40, seed=4)
    fit(dynamics(schedule=1), val=loader(held_out), max_steps=1)
    assert labels(root) == [{}] * 7
    # What all else is measured on is as it was, spread over all of the data.
    few = windows(held_out, context=CONTEXT, sequences=4).tolist()
    assert stimulus(root, "text") == few
    assert stimulus(root, "concepts")[::2] == few


def test_what_is_of_no_use_is_refused_before_the_first_step(fit, dynamics):
    with pytest.raises(TypeError, match="got str in it"):
        dynamics(concepts=["capital"])
    with pytest.raises(ValueError, match="'x': its label function raised AssertionError: a label"):
        fit(dynamics(concepts=[Concept("x", label=raising)]))
    # What is in these batches is no token ids.
    with pytest.raises(ValueError, match=r"functions \(even\), and there is no text .* with text="):
        fit(dynamics(concepts=[CONCEPTS[0]]), train=loader(torch.zeros(64, CONTEXT)))


def test_a_run_goes_on_with_the_labels_that_it_has(tmp_path):
    torch.manual_seed(0)
    model, more = TinyLM(), {"probes": ["in_context"], "run": "one", "sequences": 4}
    with Monitor(tmp_path, text=text(), concepts=CONCEPTS, **more) as watch:
        watch.measure(model, step=0)
    before = monitor.read(tmp_path, "stimuli")["labels"].map(str).tolist()
    other = [Concept("even", label=raising)]
    with Monitor(tmp_path, text=text(8, seed=1), concepts=other, **more) as watch:
        subject = watch.prepare(model, 1)
        assert subject.stimuli["concepts"].labels.names == ("even", "third", "after_even")
    assert monitor.read(tmp_path, "stimuli")["labels"].map(str).tolist() == before
    configs = monitor.read(tmp_path, "attempts")["config"].map(json.loads)
    assert [list(config["concepts"]) for config in configs] == [["even", "third", "after_even"]] * 2
