"""Trainings of a tiny GPT-2 by the Trainer of transformers, and callbacks that watch them."""

import pytest
from transformers import Trainer, TrainingArguments

from callbacks.huggingface import TrainingDynamics
from tests.callbacks.huggingface.rows import BATCH, Rows, text
from tests.callbacks.tiny import OBSERVING
from tests.models import gpt2


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def dynamics(root):
    """Makes callbacks that measure few sequences, however long that takes."""

    def dynamics(**more):
        few = {"metrics_port": None, "sequences": 4, "root": root, "overhead": None}
        few["probes"] = OBSERVING
        return TrainingDynamics(**(few | more))

    return dynamics


@pytest.fixture
def trainer(tmp_path):
    """Makes Trainers for 8 steps that are silent and save nothing; other arguments are theirs."""

    def trainer(*callbacks, model=None, train=None, held_out=None, **more):
        defaults = {
            "output_dir": str(tmp_path / "saved"),
            "max_steps": 8,
            "per_device_train_batch_size": BATCH,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        return Trainer(
            model=gpt2() if model is None else model,
            args=TrainingArguments(**(defaults | more)),
            train_dataset=Rows(text()) if train is None else train,
            eval_dataset=held_out,
            callbacks=list(callbacks),
        )

    return trainer
