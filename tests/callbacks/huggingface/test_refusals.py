"""What the callback for the Trainer of transformers refuses, before a step is trained, and
what stops no training.
"""

import logging
import types

import pytest
import torch

import monitor
from callbacks.huggingface import TrainingDynamics
from monitor.capture import NoAttentionError
from monitor.measure import Monitor
from tests.callbacks.huggingface.rows import text
from tests.models import VOCABULARY, Bigram, gpt2
from tests.recorded import steps


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 9}, ValueError, "never fires in this training, which ends at step 8"),
        ({"text": text() + VOCABULARY}, ValueError, "expected 0 to 47"),
        ({"context": 65}, ValueError, "context=65 is longer than the 64 positions"),
        ({"vocab_size": 99}, ValueError, f"own vocabulary of {VOCABULARY}"),
        ({"sequences": 1}, ValueError, "sequences=1"),
        ({"model": "lm"}, ValueError, "GPT2LMHeadModel has no such attribute"),
    ],
)
def test_arguments_that_are_refused_before_the_first_step(
    trainer, dynamics, root, arguments, error, message
):
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    running = trainer(dynamics(**arguments), model=model)
    with pytest.raises(error, match=message):
        running.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not root.exists() or monitor.tables(root) == []


@pytest.mark.parametrize("overhead", [0, -1, 2, "2%", True])
def test_overheads_that_are_refused_at_once(overhead):
    with pytest.raises(ValueError, match=r"overhead=.*expected the share"):
        TrainingDynamics(overhead=overhead)


def test_a_model_that_shows_no_attention_is_refused(trainer, dynamics):
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Bigram(vocab_size=VOCABULARY)

        def forward(self, input_ids, labels):
            logits = self.net(input_ids)
            return {"loss": torch.nn.functional.cross_entropy(logits.mT, labels)}

    with pytest.raises(NoAttentionError):
        trainer(dynamics(), model=Counts()).train()
    trainer(dynamics(probes=["in_context"]), model=Counts()).train()


def test_somebody_elses_loop_is_told_so(dynamics):
    with pytest.raises(RuntimeError, match=r"Trainer\(callbacks=\[...\]\).*monitor.measure"):
        dynamics().on_train_begin(None, types.SimpleNamespace(stateful_callbacks={}), None)


def test_a_probe_that_raises_does_not_stop_training(trainer, dynamics, root, monkeypatch, caplog):
    def broken(observations):
        raise ZeroDivisionError("planted")

    prepare = Monitor.prepare

    def prepare_broken(self, *arguments):
        given = prepare(self, *arguments)
        first, *rest = self._probes
        self._probes = (type(first)(spec=first.spec, compute=broken), *rest)
        return given

    monkeypatch.setattr(Monitor, "prepare", prepare_broken)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        done = trainer(dynamics(schedule=2)).train()
    assert done.global_step == 8
    assert steps(root) == [0, 2, 4, 6, 8]
    assert len(monitor.read(root, "failures")) == 5
    assert caplog.text.count("induction failed, training goes on") == 1
