"""Training with the Trainer of transformers is bit-identical with and without the callback,
which needs no package of another trainer.
"""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import callbacks
from tests.callbacks.huggingface.rows import BATCH, Rows, text
from tests.callbacks.tiny import OBSERVING, identical
from tests.models import VOCABULARY, gpt2
from tests.recorded import steps


class Jittered(Rows):
    """Examples that draw on every random stream there is."""

    def __getitem__(self, index):
        shift = random.randrange(3) + int(np.random.randint(3)) + int(torch.randint(3, ()))
        row = (self.rows[index] + shift) % VOCABULARY
        return {"input_ids": row, "labels": row}


class Batches(Trainer):
    def training_step(self, model, inputs, *others, **named):
        vars(self).setdefault("seen", []).append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *others, **named)


def train_jittered(folder, *callbacks) -> dict:
    """Trains with dropout; everything that training left behind."""
    running = Batches(
        model=gpt2(resid_pdrop=0.2, attn_pdrop=0.1),
        args=TrainingArguments(
            str(folder), max_steps=40, per_device_train_batch_size=BATCH, use_cpu=True,
            report_to=[], disable_tqdm=True, eval_strategy="steps", eval_steps=7,
            save_strategy="no", logging_steps=5, gradient_accumulation_steps=2, seed=11,
        ),
        train_dataset=Jittered(text()),
        eval_dataset=Jittered(text(8, seed=3)),
        callbacks=list(callbacks),
    )  # fmt: skip
    running.train()
    timing = ("runtime", "per_second")
    return {
        "weights": running.model.state_dict(),
        "optimizer": running.optimizer.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "batches": torch.stack(running.seen),
        "modes": [part.training for part in running.model.modules()],
        "log": [
            {name: value for name, value in line.items() if not name.endswith(timing)}
            for line in running.state.log_history
        ],
    }


class Draw(TrainerCallback):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 30:
            torch.rand(1)


def test_training_is_bit_identical_with_and_without_it(dynamics, root, tmp_path):
    bare = train_jittered(tmp_path / "bare")
    probes = [*OBSERVING, "optimisation"]
    watching = dynamics(schedule=3, metrics_port=0, probes=probes)
    watched = train_jittered(tmp_path / "watched", watching)
    assert steps(root) == list(range(0, 40, 3))
    for what, expected in bare.items():
        assert identical(expected, watched[what]), what
    # The comparison can fail.
    disturbed = train_jittered(tmp_path / "disturbed", Draw())
    same = {what for what in bare if identical(bare[what], disturbed[what])}
    assert same.isdisjoint({"weights", "optimizer", "torch", "batches"})
    assert {"modes"} <= same


def test_the_trainers_own_step_comes_back_as_it_was(trainer, dynamics):
    calls = []
    running = trainer(dynamics(schedule=8))
    own = running.training_step

    def step(*arguments, **named):
        calls.append(len(arguments))
        return own(*arguments, **named)

    running.training_step = step
    running.train()
    assert len(calls) == 8
    assert vars(running)["training_step"] is step


@pytest.mark.parametrize(
    ("absent", "statement"),
    [
        (["transformers", "lightning", "pytorch_lightning"], "import callbacks.watching"),
        (["lightning", "pytorch_lightning"], "from callbacks.huggingface import TrainingDynamics"),
    ],
)
def test_one_trainers_callback_does_not_need_the_others_package(absent, statement):
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {statement}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_what_the_package_does_not_have():
    with pytest.raises(AttributeError, match="'callbacks' has no attribute 'TrainingDynamcs'"):
        callbacks.TrainingDynamcs  # noqa: B018
