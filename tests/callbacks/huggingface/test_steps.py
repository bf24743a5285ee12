"""At which steps the callback for the Trainer of transformers measures, what numbers and tokens,
and where held-out text comes from.
"""

import socket

import datasets
import pytest
import torch
from torch.utils.data import Dataset
from transformers import GPT2LMHeadModel

import callbacks
import monitor
from callbacks.huggingface import TrainingDynamics
from tests.callbacks.huggingface.rows import (
    BATCH,
    CONTEXT,
    HELD_OUT,
    SAVING,
    TOKENS_A_BATCH,
    Keep,
    Rows,
    Stream,
    check_numbers,
    text,
)
from tests.models import VOCABULARY, gpt2
from tests.recorded import attempt, said, steps, stimulus, tokens

# When, and what


def test_everything_by_default(trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Somebody else may use the default one.
    monkeypatch.setitem(TrainingDynamics.__init__.__kwdefaults__, "metrics_port", port)
    trainer(TrainingDynamics(overhead=None)).train()
    assert steps("runs") == [0, 1, 2, 4, 8]
    heads = monitor.read("runs", "induction")
    assert len(heads) == 5 * 8
    assert set(heads["validity"]) == {"ok"}
    assert tokens("runs") == [step * TOKENS_A_BATCH for step in (0, 1, 2, 4, 8)]
    row = attempt("runs")
    assert row["config"]["model"] == "GPT2LMHeadModel"
    assert row["config"]["text"] == "training data"
    assert row["config"]["world_size"] == 1


def test_its_arguments_are_those_of_the_other_callback():
    """In one place, so that they cannot come apart."""
    assert TrainingDynamics.__init__ is callbacks.TrainingDynamics.__init__


def test_every_checkpoint_and_the_schedule(trainer, dynamics, root, tmp_path):
    keep = Keep()
    watching = dynamics(schedule=[0, 2, 5], text=HELD_OUT, context=CONTEXT)
    trainer(watching, keep, **SAVING, held_out=Rows(text(8)), eval_strategy="steps",
            eval_steps=2).train()  # fmt: skip
    assert steps(root) == [0, 2, 3, 5, 6, 8]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (0, 2, 3, 5, 6, 8)]
    for step in (2, 5):
        model = gpt2()
        model.load_state_dict(keep.weights[step])
        check_numbers(root, step, model)
    for step in (3, 6, 8):
        check_numbers(
            root, step, GPT2LMHeadModel.from_pretrained(tmp_path / f"saved/checkpoint-{step}")
        )


def test_checkpoints_at_the_ends_of_epochs(trainer, dynamics, root):
    trainer(dynamics(schedule=[1]), train=Rows(text(12)), save_strategy="epoch", max_steps=-1,
            num_train_epochs=2).train()  # fmt: skip
    assert steps(root) == [1, 3, 6]


def test_steps_are_updates_when_gradients_accumulate(trainer, dynamics, root):
    trainer(dynamics(schedule=2), gradient_accumulation_steps=3, max_steps=4).train()
    assert steps(root) == [0, 2, 4]
    # An epoch has 16 batches: its last update is made of one.
    assert tokens(root) == [step * 3 * TOKENS_A_BATCH for step in (0, 2, 4)]
    assert attempt(root)["config"]["accumulate_grad_batches"] == 3


def test_padding_is_not_counted_among_the_tokens(trainer, dynamics, root):
    trainer(dynamics(schedule=2, text=HELD_OUT), train=Rows(text(), real=20), max_steps=2).train()
    assert tokens(root) == [0, 2 * BATCH * 20]


def test_the_schedule_is_thinned_to_the_budget_and_checkpoints_are_not(
    trainer, dynamics, root, caplog
):
    trainer(dynamics(schedule=1, overhead=1e-6), **SAVING).train()
    assert steps(root) == [0, 3, 6, 8]
    assert sum("overhead=1e-06" in line for line in said(caplog)) == 1


# Its new name is not known to the versions before.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_other_ways_to_train(trainer, dynamics, root, precision):
    model = gpt2()
    model.gradient_checkpointing_enable()
    watching = dynamics(schedule=2, text=HELD_OUT)
    trainer(watching, model=model, max_steps=2, bf16=precision == "bf16").train()
    assert set(monitor.read(root, "induction")["validity"]) == {"ok"}
    assert attempt(root)["config"]["precision"] == precision
    assert steps(root) == [0, 2]


def test_two_models_under_watch_in_one_training(trainer, root, dynamics):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.student = gpt2(tie_word_embeddings=False)
            self.teacher = gpt2(tie_word_embeddings=False, n_layer=1)

        def forward(self, input_ids, labels):
            return self.student(input_ids=input_ids, labels=labels)

    how = {"text": HELD_OUT, "context": CONTEXT, "schedule": 4}
    watching = [
        dynamics(model="student", root=root / "student", **how),
        dynamics(model=lambda both: both.teacher, root=root / "teacher", **how),
    ]
    running = trainer(*watching, model=Both(), **SAVING)
    running.train()
    for name, layers in (("student", 2), ("teacher", 1)):
        assert steps(root / name) == [0, 3, 4, 6, 8]
        assert monitor.read(root / name, "induction")["layer"].nunique() == layers
        assert tokens(root / name)[-1] == 8 * TOKENS_A_BATCH
    kept = running.state.stateful_callbacks
    assert {kept["phasewatch.0"]["run"], kept["phasewatch.1"]["run"]} == {
        attempt(root / name)["run"] for name in ("student", "teacher")
    }
    assert "training_step" not in vars(running)


# Held-out text


class Broken(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise OSError("planted")


def table(rows):
    """With columns that no model takes."""
    return datasets.Dataset.from_dict(
        {"input_ids": rows.tolist(), "labels": rows.tolist(), "title": ["a"] * len(rows)}
    )


@pytest.mark.parametrize(
    "held_out",
    [
        Rows(HELD_OUT),
        {"a": Broken(), "b": Rows(HELD_OUT)},
        table(HELD_OUT),
    ],
)
def test_held_out_text_comes_from_the_evaluation_data(trainer, dynamics, root, held_out):
    trainer(dynamics(schedule=8), held_out=held_out).train()
    assert attempt(root)["config"]["text"] == "evaluation data"
    shown = stimulus(root, "text")
    assert len(shown) == 4
    assert all(row in HELD_OUT.tolist() for row in shown)


@pytest.mark.parametrize("held_out", [None, Broken(), Rows(text(8) + VOCABULARY)])
@pytest.mark.parametrize("train", [Rows, table])
def test_else_from_the_training_data(trainer, dynamics, root, held_out, train):
    trainer(dynamics(schedule=8), train=train(text(seed=3)), held_out=held_out).train()
    assert attempt(root)["config"]["text"] == "training data"
    assert all(row in text(seed=3).tolist() for row in stimulus(root, "text"))


def test_else_from_the_first_batch(trainer, dynamics, root):
    trainer(dynamics(schedule=8), train=Stream(text(seed=3))).train()
    assert attempt(root)["config"]["text"] == "first training batch"
    assert sorted(stimulus(root, "text")) == sorted(text(seed=3)[:BATCH].tolist())
    assert tokens(root) == [0, 8 * TOKENS_A_BATCH]
