"""A task in trainings under Lightning: its model is found and measured though it reads nothing
else, training is as it is without, and what is no task is refused at once.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import monitor
from monitor.tasks import ModularAddition
from tests.callbacks.tiny import LIGHTNING_WARNINGS, identical
from tests.models.sums import ShortTransformer, random_pairs
from tests.recorded import stimulus

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

P = 11
PAIRS = random_pairs(P)
TASK = ModularAddition(P, train=PAIRS)


def adding(package):
    class Adding(importlib.import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ShortTransformer(P)

        def training_step(self, batch, batch_idx):
            questions, answers = batch
            return F.cross_entropy(self.net(questions)[:, -1], answers)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1.0)

    torch.manual_seed(0)
    return Adding()


def questions():
    asked = torch.cat([PAIRS, torch.full((len(PAIRS), 1), P)], dim=1)
    return DataLoader(TensorDataset(asked, PAIRS.sum(1) % P), batch_size=8, shuffle=True)


def test_a_task_is_measured_and_training_is_as_without(fit, dynamics, root, package):
    trained = []
    for callbacks in ([], [dynamics(task=TASK, probes=["grokking"], schedule=5)]):
        module = adding(package)
        torch.manual_seed(1)
        trained.append(fit(*callbacks, module=module, train=questions(), max_steps=30).state_dict())
    assert identical(*trained)
    told = monitor.read(root, "grokking")
    assert told["step"].tolist() == list(range(0, 31, 5))
    assert (told["validity"] == "ok").all()
    assert told["train_loss"].iloc[-1] < told["train_loss"].iloc[0]
    assert stimulus(root, "task") == TASK.questions().tokens.tolist()


def test_what_is_no_task_is_refused_at_once(dynamics):
    with pytest.raises(TypeError, match="task= is list; expected a Task or a ModularAddition"):
        dynamics(task=[1, 2])
