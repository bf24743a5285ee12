"""Runs under the Trainer of transformers: from a checkpoint, after they were broken off, once
more, and what is served meanwhile.
"""

import json
import shutil
import socket
import urllib.parse

import pytest
from transformers import TrainerCallback

import monitor
from tests.callbacks.huggingface.rows import (
    SAVING,
    TOKENS_A_BATCH,
)
from tests.recorded import page, steps, stimulus, tokens


@pytest.fixture
def saved(trainer, dynamics):
    """A run of 8 steps, with checkpoints at 3, 6 and 8."""
    trainer(dynamics(schedule=2), **SAVING).train()


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_goes_on_from_a_checkpoint(trainer, dynamics, root, tmp_path, saved, restore):
    stimuli = stimulus(root, "repeated")
    shutil.rmtree(tmp_path / "saved/checkpoint-8")
    running = trainer(
        dynamics(schedule=2, seed=3), max_steps=10, **SAVING,
        restore_callback_states_from_checkpoint=restore,
    )  # fmt: skip
    running.train(resume_from_checkpoint=True)
    frame = monitor.read(root, "in_context")
    assert frame["run"].nunique() == 1
    assert frame["step"].tolist() == [0, 2, 3, 4, 6, 8, 9, 10]
    assert frame["attempt"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in frame["step"]]
    assert monitor.read(root, "attempts")["resumed_from"].fillna(-1).tolist() == [-1, 6]
    assert stimulus(root, "repeated") == stimuli
    assert len(list(root.glob("_superseded/in_context/run=*/*.parquet"))) == 1


def test_a_checkpoint_saved_without_the_callback(trainer, dynamics, root, tmp_path):
    trainer(**SAVING, max_steps=3).train()
    trainer(dynamics(schedule=2), **SAVING).train(resume_from_checkpoint=True)
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [4, 6, 8]
    # Nobody counted the tokens of the first three steps: a number would be wrong.
    assert frame["tokens"].isna().all()
    state = json.loads((tmp_path / "saved/checkpoint-8/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["phasewatch"] == {"run": frame["run"][0], "tokens": None}


def test_a_new_training_with_the_same_callback_is_a_new_run(trainer, dynamics, root):
    running = trainer(dynamics(schedule=4))
    running.train()
    running.train()
    assert steps(root) == [0, 4, 8] * 2
    assert tokens(root) == [0, 4 * TOKENS_A_BATCH, 8 * TOKENS_A_BATCH] * 2
    assert monitor.read(root, "in_context")["run"].nunique() == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_can_be_read_and_goes_on(trainer, dynamics, root, error):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **more):
            if state.global_step == 5:
                raise error("stop")

    watching, stop = dynamics(schedule=1, metrics_port=0), Stop()
    running = trainer(watching, stop, **SAVING)
    with pytest.raises(error, match="stop"):
        running.train()
    assert steps(root) == [0, 1, 2, 3, 4, 5]
    port = urllib.parse.urlsplit(watching.monitor.url).port
    # In the same process, as a notebook would.
    running.remove_callback(stop)
    running.train(resume_from_checkpoint=True)
    assert monitor.read(root, "in_context")["attempt"].tolist() == [1] * 4 + [2] * 5
    assert monitor.read(root, "in_context")["run"].nunique() == 1
    assert tokens(root) == [step * TOKENS_A_BATCH for step in range(9)]
    assert "training_step" not in vars(running)
    socket.create_server(("127.0.0.1", port)).close()


def test_metrics_while_it_trains(trainer, dynamics):
    pages = []

    class Look(TrainerCallback):
        def on_step_end(self, *arguments, **more):
            pages.append(page(watching.monitor.url))

    watching = dynamics(schedule=1, run="mine", metrics_port=0)
    trainer(watching, Look(), max_steps=2).train()
    for step, shown in zip((1, 2), pages, strict=True):
        assert f'phasewatch_step{{run="mine"}} {step}.0' in shown
        assert f'phasewatch_tokens{{run="mine"}} {step * TOKENS_A_BATCH}.0' in shown
    assert watching.monitor is None
