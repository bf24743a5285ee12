"""Training is bit-identical with and without the callback, and sees the same batches."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.callbacks.tiny import (
    BATCH,
    LIGHTNING_WARNINGS,
    OBSERVING,
    VOCABULARY,
    Stream,
    hook,
    identical,
    loader,
    text,
    tiny_class,
    trainer,
)
from tests.recorded import steps

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

# 25 epochs of 8 batches: room for a stray draw anywhere to show.
STEPS = 200


class Jittered(Dataset):
    """Examples that draw on every random stream there is."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        shift = random.randrange(3) + int(np.random.randint(3)) + int(torch.randint(3, ()))
        return ((self.tokens[index] + shift) % VOCABULARY,)


def train_jittered(package, folder, callbacks):
    """Trains with dropout; everything that training left behind."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    module = tiny_class(package)(dropout=0.2)
    running = trainer(
        package, folder, callbacks=callbacks, max_steps=STEPS, gradient_clip_val=1.0,
        val_check_interval=8,
    )  # fmt: skip
    running.fit(
        module,
        DataLoader(Jittered(text(64)), BATCH, shuffle=True),
        DataLoader(Jittered(text(8, seed=3)), BATCH),
    )
    (optimizer,) = running.optimizers
    return {
        "weights": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "batches": torch.stack(module.seen),
        "modes": [part.training for part in module.modules()],
    }


@pytest.fixture(scope="module")
def bare(package, tmp_path_factory):
    """What the training leaves behind without us."""
    return train_jittered(package, tmp_path_factory.mktemp("bare"), [])


@pytest.mark.parametrize("every", [1, 10])
def test_training_is_bit_identical_with_and_without_it(
    package, tmp_path, dynamics, root, bare, every
):
    watching = dynamics(schedule=every, metrics_port=0, probes=[*OBSERVING, "optimisation"])
    watched = train_jittered(package, tmp_path, [watching])
    assert len(steps(root)) == STEPS // every + 1
    for what, expected in bare.items():
        assert identical(expected, watched[what]), what


def test_the_comparison_can_fail(package, tmp_path, bare):
    def draw(trainer, *_):
        if trainer.global_step == STEPS - 20:
            torch.rand(1)

    disturbed = train_jittered(package, tmp_path, [hook(package, on_train_batch_end=draw)])
    same = {what for what in bare if identical(bare[what], disturbed[what])}
    assert same.isdisjoint({"weights", "optimizer", "torch", "batches"})
    assert {"python", "modes"} <= same


@pytest.mark.parametrize("kind", ["stream", "shuffled"])
@pytest.mark.parametrize("val", [None, "stream", "shuffled"])
def test_training_sees_the_same_batches(fit, dynamics, kind, val):
    def data(kind):
        if kind == "stream":
            return DataLoader(Stream(), BATCH)
        return None if kind is None else loader(shuffle=True)

    seen, taken = [], []
    for callbacks in ([], [dynamics(schedule=4)]):
        train = data(kind)
        module = fit(*callbacks, train=train, val=data(val))
        seen.append(torch.stack(module.seen).tolist())
        taken.append(getattr(train.dataset, "taken", None))
    assert seen[0] == seen[1]
    assert taken[0] == taken[1]
