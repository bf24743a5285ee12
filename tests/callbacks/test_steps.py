"""At which steps of a training is measured: where the schedule says so and at every checkpoint that
is saved, and that the numbers are those of the weights at that step.
"""

import time

import pytest
import torch
from torch.utils.data import DataLoader

import monitor
from monitor.measure import measure
from tests.callbacks.tiny import (
    BATCH,
    LIGHTNING_WARNINGS,
    TOKENS_A_BATCH,
    Stream,
    TinyLM,
    hook,
    loader,
    saver,
    text,
    tiny_class,
)
from tests.recorded import attempt, said, steps, tokens

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

HELD_OUT = text(seed=5)


def check_numbers(root, step: int, weights: dict) -> None:
    """What is stored at a step is what these weights give, to the last bit."""
    model = TinyLM()
    model.load_state_dict({key.removeprefix("net."): value for key, value in weights.items()})
    expected = measure(model, text=HELD_OUT, sequences=4)
    for table, field in (("induction", "prefix_matching"), ("in_context", "score")):
        stored = monitor.read(root, table).query(f"step == {step}")[field]
        assert stored.tolist() == expected[table][field].tolist()


def saved(folder) -> dict[int, dict]:
    """The weights in each checkpoint of a folder, by the step that names it."""
    return {
        int(path.stem): torch.load(path, weights_only=False)["state_dict"]
        for path in folder.glob("*.ckpt")
    }


class Keep:
    """The weights after each step, as a hook that a callback has for the end of a batch."""

    def __init__(self):
        self.weights = {}

    def __call__(self, trainer, module, *_):
        self.weights[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}


# The schedule


def test_what_is_measured_is_the_model_after_that_many_steps(fit, dynamics, root, package):
    keep = Keep()
    fit(dynamics(schedule=3, text=HELD_OUT), hook(package, on_train_batch_end=keep))
    assert steps(root) == [0, 3, 6]
    for step in (3, 6):
        check_numbers(root, step, keep.weights[step])


def test_steps_are_optimizer_steps_when_gradients_accumulate(fit, dynamics, root):
    fit(dynamics(schedule=2), accumulate_grad_batches=4, max_steps=6)
    assert steps(root) == [0, 2, 4, 6]
    assert tokens(root) == [step * 4 * TOKENS_A_BATCH for step in (0, 2, 4, 6)]
    assert attempt(root)["config"]["accumulate_grad_batches"] == 4


def test_two_optimizers_that_take_two_steps_a_batch(fit, dynamics, root, package):
    """Steps that are passed over are made up for at the end of the batch that passed them."""

    class TwoOptimizers(tiny_class(package)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            blocks = list(self.net.blocks.parameters())
            others = [p for p in self.net.parameters() if all(p is not b for b in blocks)]
            return [torch.optim.AdamW(some, lr=3e-3) for some in (blocks, others)]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

    keep = Keep()
    module = fit(
        dynamics(schedule=5, text=HELD_OUT),
        hook(package, on_train_batch_end=keep),
        module=TwoOptimizers(),
        max_steps=16,
    )
    assert len(module.seen) == 8
    assert list(keep.weights) == list(range(2, 17, 2))
    assert steps(root) == [0, 6, 10, 16]
    assert tokens(root) == [step / 2 * TOKENS_A_BATCH for step in (0, 6, 10, 16)]
    for step in (6, 10, 16):
        check_numbers(root, step, keep.weights[step])


def test_a_stream_of_unknown_length_for_one_epoch(fit, dynamics, root):
    module = fit(
        dynamics(schedule=4), train=DataLoader(Stream(), BATCH), max_epochs=1, max_steps=-1
    )
    assert len(module.seen) == 16
    assert steps(root) == [0, 4, 8, 12, 16]


def test_the_schedule_is_thinned_to_the_budget_and_checkpoints_are_not(
    fit, dynamics, root, package, tmp_path, caplog
):
    saving = saver(package, tmp_path / "saved", every_n_train_steps=3)
    fit(dynamics(schedule=1, overhead=1e-6), saving, enable_checkpointing=True)
    assert steps(root) == [0, 3, 6]
    assert sum("overhead=1e-06" in line for line in said(caplog)) == 1


def test_within_the_budget_all_is_measured(fit, dynamics, root, package, caplog):
    pause = hook(package, on_train_batch_start=lambda *_: time.sleep(0.05))
    fit(dynamics(schedule=[0, 6], overhead=1.0, probes=["in_context"]), pause)
    assert steps(root) == [0, 6]
    assert said(caplog) == []


# Checkpoints


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_that_is_saved(fit, dynamics, root, package, tmp_path, weights_only):
    how = {"every_n_train_steps": 3, "save_weights_only": weights_only}
    saving = saver(package, tmp_path / "saved", **how)
    watching = dynamics(schedule=[2, 5], text=HELD_OUT)
    fit(watching, saving, enable_checkpointing=True, max_steps=9)
    assert steps(root) == [2, 3, 5, 6, 9]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (2, 3, 5, 6, 9)]
    checkpoints = saved(tmp_path / "saved")
    assert set(checkpoints) == {3, 6, 9}
    for step, weights in checkpoints.items():
        check_numbers(root, step, weights)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("with_validation", [False, True])
def test_checkpoints_at_the_ends_of_epochs(
    fit, dynamics, root, package, tmp_path, weights_only, with_validation
):
    saving = saver(package, tmp_path / "saved", save_weights_only=weights_only)
    fit(
        dynamics(schedule=[1]),
        saving,
        train=loader(text(12)),
        val=loader(text(4)) if with_validation else None,
        enable_checkpointing=True,
        max_epochs=2,
        max_steps=-1,
    )
    assert steps(root) == [1, 3, 6]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (1, 3, 6)]


@pytest.mark.parametrize("own_first", [False, True])
def test_a_checkpoint_saved_by_hand(fit, dynamics, root, package, tmp_path, own_first):
    path = tmp_path / "mine.ckpt"

    def save(trainer, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(path)

    callbacks = [dynamics(schedule=[6]), hook(package, on_train_batch_end=save)]
    fit(*(reversed(callbacks) if own_first else callbacks), max_steps=6)
    assert steps(root) == [4, 6]
    # Whichever of the two comes first.
    assert tokens(root) == [4 * TOKENS_A_BATCH, 6 * TOKENS_A_BATCH]
    state = torch.load(path, weights_only=False)["callbacks"]["TrainingDynamics"]
    assert state["run"] == attempt(root)["run"]
    assert state["tokens"] == 4 * TOKENS_A_BATCH


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("where", ["in a batch", "after a batch"])
def test_a_checkpoint_saved_because_training_raised(
    fit, dynamics, root, package, tmp_path, weights_only, where
):
    def stop(trainer, place):
        if trainer.global_step == 5 and place == where:
            raise RuntimeError("planted")

    class Stopping(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            stop(self.trainer, "in a batch")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_):
            stop(self.trainer, "after a batch")

    saving = saver(
        package, tmp_path / "saved", save_on_exception=True, save_weights_only=weights_only
    )
    watching = dynamics(schedule=[2], text=HELD_OUT)
    with pytest.raises(RuntimeError, match="planted"):
        fit(watching, saving, module=Stopping(), enable_checkpointing=True)
    assert steps(root) == [2, 5]
    assert tokens(root) == [2 * TOKENS_A_BATCH, 5 * TOKENS_A_BATCH]
    ((step, weights),) = saved(tmp_path / "saved").items()
    assert step == 5
    check_numbers(root, step, weights)
    assert watching.monitor is None
