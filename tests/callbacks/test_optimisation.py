"""What trainers' callbacks tell of optimisers and the loss: that of the step that is measured, with
gradients accumulated and clipped; what was not foreseen is missing; the hooks are gone afterwards.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import monitor
from monitor.noise_scale import ONE_BATCH, noise_scale
from monitor.optimising import NOT_YET, UNFORESEEN
from tests.callbacks.tiny import (
    LIGHTNING_WARNINGS,
    hook,
    identical,
    loader,
    saver,
    text,
    tiny_class,
    trainer,
)

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

PROBES = ["optimisation"]


def table(root):
    read = monitor.read(root, "optimisation")
    return read[read.family == "all"].set_index("step")


class Keep:
    """What the optimiser has, and does, at every step, seen from outside."""

    def __init__(self, package):
        self.gradients, self.weights, self.rates = {}, {}, {}
        self.callback = hook(
            package, on_train_batch_start=self.before, on_train_batch_end=self.seen
        )

    def before(self, trainer, module, *_):
        self.weights.setdefault(trainer.global_step, self.flat(module.net.parameters()))

    def seen(self, trainer, module, *_):
        step = trainer.global_step
        self.weights[step] = self.flat(module.net.parameters())
        gradients = [p.grad for p in module.net.parameters()]
        self.gradients[step] = self.flat(gradients).norm().item()

    @staticmethod
    def flat(tensors):
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    def update(self, step):
        return (self.weights[step] - self.weights[step - 1]).norm().item()


def scheduled(package):
    """Its learning rate falls with every step."""

    class Scheduled(tiny_class(package)):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Scheduled


@pytest.fixture
def train(package, tmp_path):
    def train(*callbacks, **more):
        torch.manual_seed(0)
        module = scheduled(package)()
        running = trainer(package, tmp_path, callbacks=list(callbacks), **more)
        running.fit(module, loader(), loader(text(8, seed=3)))
        return running, module

    return train


def test_every_number_is_that_of_the_step(package, train, dynamics, root):
    keep = Keep(package)
    running, _ = train(
        dynamics(probes=PROBES, schedule=2), keep.callback, gradient_clip_val=0.7, max_steps=8
    )
    told = table(root)
    assert told["validity"].tolist() == [NOT_YET, *["ok"] * 4]
    for step in (2, 4, 6, 8):
        row = told.loc[step]
        assert row["gradient_norm"] == pytest.approx(keep.gradients[step], rel=1e-5)
        assert row["gradient_norm"] <= 0.7001
        assert row["update_norm"] == pytest.approx(keep.update(step), rel=1e-4)
        # The rate that the update was made with, not that of the next one.
        assert row["learning_rate"] == pytest.approx(3e-3 / step)
    assert (told["steps_per_second"].iloc[1:] > 0).all()
    assert (told["tokens_per_second"] / told["steps_per_second"]).iloc[1:].tolist() == (
        pytest.approx([128.0] * 4)
    )
    (optimizer,) = running.optimizers
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_that_of_the_step(package, train, dynamics, root, accumulate):
    """Eight batches an epoch: of three each, the last step of an epoch has two."""
    keep, losses = Keep(package), []

    def seen(trainer, module, outputs, batch, *_):
        losses.append((trainer.global_step, outputs["loss"].item() * accumulate))

    train(
        dynamics(probes=PROBES, schedule=1), keep.callback, hook(package, on_train_batch_end=seen),
        max_steps=6, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    expected, batches = {}, []
    for step, loss in losses:
        batches.append(loss)
        if step not in expected and step > len(expected):
            expected[step], batches = np.mean(batches), []
    told = table(root)
    assert np.isnan(told.loc[0, "loss"])
    assert told["loss"].iloc[1:].tolist() == pytest.approx(list(expected.values()), rel=1e-6)
    assert told["update_norm"].iloc[1:].tolist() == pytest.approx(
        [keep.update(step) for step in range(1, 7)], rel=1e-4
    )


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_noise_scale_is_that_of_micro_batches_and_training_is_the_same(
    package, train, dynamics, root, accumulate
):
    """Clipped afterwards; the gradients are computed again here, and not there."""
    more = {"max_steps": 6, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.1}
    keep = Keep(package)
    _, bare = train(**more)
    _, module = train(dynamics(probes=PROBES, schedule=3), keep.callback, **more)
    assert identical(bare.state_dict(), module.state_dict())
    row, batches = table(root).loc[6], module.seen[5 * accumulate : 6 * accumulate]
    if accumulate == 1:
        assert row["noise_scale_why"] == ONE_BATCH
        assert np.isnan(row["gradient_signal"])
        return
    torch.nn.utils.vector_to_parameters(keep.weights[5].float(), module.net.parameters())
    gradients = [
        torch.autograd.grad(module.loss(tokens) / accumulate, module.net.parameters())
        for tokens in batches
    ]
    expected = noise_scale(torch.stack([keep.flat(one) for one in gradients]))
    assert row["noise_scale_why"] == expected.why
    assert row["gradient_signal"] == pytest.approx(expected.signal, rel=0.1)
    assert row["gradient_variance"] == pytest.approx(expected.variance, rel=0.1)
    assert row["gradient_signal_stderr"] == pytest.approx(expected.signal_stderr, rel=0.2)
    assert row["noise_scale"] == pytest.approx(expected.scale or np.nan, rel=0.1, nan_ok=True)


def test_the_loss_is_what_the_model_has_on_the_batch(package, train, dynamics, root):
    keep = Keep(package)
    _, module = train(dynamics(probes=PROBES, schedule=1), keep.callback, max_steps=3)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(keep.weights[2].float(), module.net.parameters())
        tokens = module.seen[2]
        logits = module.net(tokens[:, :-1])
        expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert table(root).loc[3, "loss"] == pytest.approx(expected, rel=1e-5)


def test_what_a_checkpoint_has_measured_was_not_foreseen(package, train, dynamics, root, tmp_path):
    saving = saver(package, tmp_path / "saved", every_n_train_steps=3)
    train(dynamics(probes=PROBES, schedule=4), saving, enable_checkpointing=True, max_steps=8)
    told = table(root)
    assert told["validity"].to_dict() == {
        0: NOT_YET, 3: UNFORESEEN, 4: "ok", 6: UNFORESEEN, 8: "ok"
    }  # fmt: skip
    missing = told.loc[[3, 6], ["learning_rate", "gradient_norm", "update_norm", "update_ratio"]]
    assert missing.isna().all(axis=None)
    assert told["loss"].iloc[1:].notna().all()


def test_two_optimisers_whose_steps_both_count(package, tmp_path, dynamics, root):
    """With two of them a batch takes two steps."""

    class Both(tiny_class(package)):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return loss

        def configure_optimizers(self):
            blocks = list(self.net.blocks.parameters())
            others = [p for n, p in self.net.named_parameters() if not n.startswith("blocks")]
            return [torch.optim.SGD(blocks, lr=0.1), torch.optim.SGD(others, lr=0.1)]

    watching = dynamics(probes=PROBES, schedule=4)
    running = trainer(package, tmp_path, callbacks=[watching], max_steps=12)
    running.fit(Both(), loader())
    told = table(root)
    assert told.loc[[4, 8, 12], "validity"].tolist() == ["ok"] * 3
    assert told.loc[8, "update_norm"] == pytest.approx(0.1 * told.loc[8, "gradient_norm"], rel=1e-4)
    assert told.loc[8, "loss"] > 0


def test_without_the_probe_optimisers_are_left_alone(package, train, dynamics):
    hooks = []

    def seen(trainer, *_):
        hooks.extend(trainer.optimizers[0]._optimizer_step_pre_hooks)

    train(dynamics(schedule=2), hook(package, on_train_batch_end=seen))
    assert hooks == []


def test_with_the_probe_only_what_is_measured_is_read(package, train, dynamics, monkeypatch):
    read = []
    from monitor.optimising import _Watched

    own = _Watched._compare
    monkeypatch.setattr(
        _Watched, "_compare", lambda self, *a: (read.append(bool(self._before)), own(self, *a))[1]
    )
    train(dynamics(probes=PROBES, schedule=4))
    assert read == [False, False, False, True] * 2
