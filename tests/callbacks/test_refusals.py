"""What is refused, and that it is refused before a step is trained and anything is written."""

import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import monitor
from callbacks import TrainingDynamics
from monitor.anatomy import NotALanguageModelError
from monitor.capture import NoAttentionError
from tests.callbacks.tiny import CONTEXT, LIGHTNING_WARNINGS, VOCABULARY, of, text, tiny_class
from tests.recorded import steps

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probes": ["inductoin"]}, ValueError, "known: induction, in_context, .*; did you mean"),
        ({"probes": ["induction.entrpy"]}, ValueError, "did you mean 'entropy'"),
        ({"probes": []}, ValueError, "expected a list of names"),
        ({"run": "../x"}, ValueError, "run name '../x' cannot be used"),
        ({"run": ""}, ValueError, "run name '' cannot be used"),
        ({"schedule": -1}, ValueError, "schedule=-1 never fires"),
        ({"schedule": 0}, ValueError, "schedule=0 never fires"),
        ({"schedule": []}, ValueError, r"schedule=\[\] never fires"),
        ({"schedule": [1, -2]}, ValueError, "never fires"),
        ({"overhead": 0}, ValueError, "overhead=0: expected the share of training time"),
        ({"overhead": "2%"}, ValueError, "overhead='2%'"),
        ({"adapters": [1]}, TypeError, "adapters"),
        ({"metrics_port": -1}, ValueError, "metrics_port=-1: expected 0 to 65535"),
        ({"metrics_port": 65_536}, ValueError, "metrics_port=65536"),
        ({"text": "some words"}, TypeError, "got str"),
        ({"text": [[1, 2]]}, TypeError, "got list"),
    ],
)
def test_arguments_that_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingDynamics(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 9}, ValueError, r"never fires in this training, which ends at step 8"),
        ({"schedule": [9, 100]}, ValueError, "pass a smaller schedule="),
        ({"text": text()[0]}, ValueError, r"shape \[32\].*one sequence a row"),
        ({"text": text().float()}, TypeError, r"dtype torch.float32.*not embeddings"),
        ({"text": text()[..., None]}, ValueError, r"shape \[64, 32, 1\]"),
        ({"text": text()[:0]}, ValueError, r"shape \[0, 32\]"),
        ({"text": text() + 1}, ValueError, "token ids from 1 to 32; expected 0 to 31"),
        ({"text": DataLoader(TensorDataset(torch.ones(8, 3)))}, ValueError, "no token ids"),
        ({"context": CONTEXT + 1}, ValueError, f"longer than the {CONTEXT} positions"),
        ({"context": 4}, ValueError, "context=4 is too short"),
        ({"context": 0}, ValueError, "context=0"),
        ({"vocab_size": 99}, ValueError, f"own vocabulary of {VOCABULARY}"),
        ({"sequences": 1}, ValueError, "sequences=1"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_arguments_that_are_refused_before_the_first_step(
    fit, dynamics, root, package, arguments, error, message
):
    module = tiny_class(package)()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        fit(dynamics(metrics_port=0, **arguments), module=module)
    assert module.seen == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not root.exists() or monitor.tables(root) == []


def not_a_folder(root):
    root.parent.joinpath("file").write_text("")
    return root.parent / "file" / "runs"


def of_somebody_else(root):
    root.mkdir()
    pq.write_table(pa.table({"x": [1]}), root / "data.parquet")
    return root


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (not_a_folder, OSError, r"file/runs cannot be written .*root="),
        (of_somebody_else, ValueError, "Parquet files that phasewatch did not write"),
    ],
)
def test_roots_that_are_refused(fit, dynamics, root, package, make, error, message):
    module = tiny_class(package)()
    with pytest.raises(error, match=message):
        fit(dynamics(root=make(root)), module=module)
    assert module.seen == []


def test_a_module_without_a_language_model_is_refused(fit, dynamics, package):
    class Regression(of(package, "LightningModule")):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(CONTEXT, 1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was trained")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(NotALanguageModelError, match="no language model found in Regression"):
        fit(dynamics(), module=Regression())


def test_a_model_that_shows_no_attention_is_refused(fit, dynamics, root, package):
    class Bigram(tiny_class(package)):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))

    module = Bigram()
    with pytest.raises(NoAttentionError, match=r"probes=\['in_context'\]"):
        fit(dynamics(), module=module)
    assert module.seen == []
    # And what the message says helps.
    fit(dynamics(schedule=8, probes=["in_context"]), module=Bigram())
    assert steps(root) == [0, 8]


class FSDPStrategy:
    pass


class DeepSpeedStrategy:
    zero_stage_3 = True


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, "cannot measure under FSDPStrategy: .*expected .*fully_shard"),
        (DeepSpeedStrategy, "cannot measure under DeepSpeedStrategy with ZeRO stage 3"),
    ],
)
def test_strategies_that_shard_the_model_are_refused(dynamics, strategy, message):
    """By their names: neither of them trains on a CPU."""
    trainer = types.SimpleNamespace(strategy=strategy())
    with pytest.raises(ValueError, match=message):
        dynamics().setup(trainer, None, "fit")
    dynamics().setup(trainer, None, "validate")
    trainer.strategy.zero_stage_3 = False
    if strategy is DeepSpeedStrategy:
        dynamics().setup(trainer, None, "fit")
