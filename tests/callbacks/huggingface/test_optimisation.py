"""What the Trainer's callback tells of its optimiser and loss: what the Trainer logs itself, and
what its weights do; the hooks are gone afterwards.
"""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import monitor
from monitor.noise_scale import ONE_BATCH
from monitor.optimising import NOT_YET
from tests.callbacks.huggingface.rows import Keep, Rows, text


class Gradients(TrainerCallback):
    """Norms of the gradients that the optimiser is about to have, and of those that it gets."""

    def __init__(self):
        self.norms = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        gradients = [p.grad.double().flatten() for p in model.parameters()]
        self.norms[state.global_step + 1] = torch.cat(gradients).norm().item()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_every_number_is_that_of_the_step(trainer, dynamics, root, accumulate):
    """16 batches an epoch: of three each, the last step of an epoch has one."""
    keep, gradients = Keep(), Gradients()
    watching = dynamics(probes=["optimisation"], schedule=2)
    running = trainer(
        watching, keep, gradients, train=Rows(text()), max_steps=8, max_grad_norm=0.5,
        gradient_accumulation_steps=accumulate, logging_strategy="steps", logging_steps=1,
    )  # fmt: skip
    running.train()
    read = monitor.read(root, "optimisation")
    told = read[read.family == "all"].set_index("step")
    assert told["validity"].tolist() == [NOT_YET, *["ok"] * 4]
    logged = {line["step"]: line for line in running.state.log_history if "loss" in line}
    for step in (2, 4, 6, 8):
        row = told.loc[step]
        assert row["loss"] == pytest.approx(logged[step]["loss"], abs=1e-4)
        assert row["gradient_norm"] == pytest.approx(gradients.norms[step], rel=1e-4)
        assert row["gradient_norm"] <= 0.5001
        moved = [
            (keep.weights[step][name] - old).double().norm().item()
            for name, old in keep.weights[step - 1].items()
            if name != "lm_head.weight"
        ]
        assert row["update_norm"] == pytest.approx(np.linalg.norm(moved), rel=1e-4)
        assert (row["noise_scale_why"] == ONE_BATCH) == (accumulate == 1 or step == 6)
        # The Trainer logs the rate of the step that comes next; it falls from 5e-5 to 0.
        assert row["learning_rate"] == pytest.approx(5e-5 * (9 - step) / 8, rel=1e-5)
    inner = running.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks


def test_an_optimiser_that_refuses_hooks_is_trained_with_all_the_same(
    trainer, dynamics, root, monkeypatch
):
    def refuse(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(torch.optim.Optimizer, "register_step_post_hook", refuse)
    running = trainer(dynamics(probes=["optimisation"], schedule=4))
    running.train()
    read = monitor.read(root, "optimisation")
    assert running.state.global_step == 8
    assert read[read.family == "all"]["validity"].str.startswith("no optimiser is watched").all()
