"""Runs that go on: from a checkpoint, after they were broken off, with the same callback again."""

import shutil
import signal
import socket
import urllib.parse

import pytest

import monitor
from callbacks import TrainingDynamics
from tests.callbacks.tiny import (
    LIGHTNING_WARNINGS,
    OBSERVING,
    TOKENS_A_BATCH,
    hook,
    loader,
    saver,
    text,
    tiny_class,
    train_tiny,
    trainer,
)
from tests.recorded import steps, tokens

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


@pytest.fixture(scope="module")
def trained(package, tmp_path_factory):
    """8 steps, measured at every other one and with checkpoints saved at 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    watching = TrainingDynamics(
        folder / "runs",
        probes=OBSERVING,
        schedule=2,
        overhead=None,
        sequences=4,
        metrics_port=None,
    )
    saving = saver(package, folder / "saved", every_n_train_steps=4)
    val = loader(text(16, seed=1))
    train_tiny(package, folder, watching, saving, val=val, enable_checkpointing=True)
    return folder


@pytest.fixture
def checkpoint(trained, root):
    """The checkpoint of a step of a run whose tables are at `root`."""
    shutil.copytree(trained / "runs", root)
    return lambda step: trained / f"saved/{step}.ckpt"


def set_aside(root) -> list[str]:
    return sorted(path.name for path in root.glob("_superseded/in_context/run=*/*.parquet"))


def test_a_run_goes_on_from_a_checkpoint(fit, dynamics, root, package, checkpoint):
    stimuli = monitor.read(root, "stimuli")["token_ids"].map(list).tolist()
    names = []

    def name(trainer, *_):
        names.append(second.monitor.run)

    # As a new process would: everything is new, and the validation data is another.
    second = dynamics(schedule=1, metrics_port=0)
    fit(
        second,
        hook(package, on_train_batch_end=name),
        checkpoint=checkpoint(4),
        max_steps=10,
        val=loader(text(16, seed=2)),
    )
    frame = monitor.read(root, "in_context")
    assert frame["run"].nunique() == 1
    assert set(names) == {frame["run"][0]}
    assert frame["step"].tolist() == [0, 2, 4, 5, 6, 7, 8, 9, 10]
    assert frame["attempt"].tolist() == [1] * 3 + [2] * 6
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in frame["step"]]
    attempts = monitor.read(root, "attempts")
    assert attempts["attempt"].tolist() == [1, 2]
    assert attempts["resumed_from"].fillna(-1).tolist() == [-1, 4]
    assert monitor.read(root, "stimuli")["token_ids"].map(list).tolist() == stimuli
    assert set_aside(root) == [f"{step:012d}.1.parquet" for step in (6, 8)]
    heads = monitor.read(root, "induction")
    assert not heads.duplicated(["step", "layer", "head"]).any()


def test_a_run_goes_on_twice_from_the_same_checkpoint(fit, dynamics, root, checkpoint):
    for _ in range(2):
        fit(dynamics(schedule=2), checkpoint=checkpoint(4))
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [0, 2, 4, 6, 8]
    assert frame["attempt"].tolist() == [1, 1, 1, 3, 3]
    assert set_aside(root) == [
        f"{step:012d}.{attempt}.parquet" for step in (6, 8) for attempt in (1, 2)
    ]


def test_a_run_that_is_named_anew_when_it_goes_on(fit, dynamics, root, checkpoint):
    (first,) = monitor.read(root, "attempts")["run"]
    fit(dynamics(schedule=2, run="branch"), checkpoint=checkpoint(4))
    assert steps(root, run=first) == [0, 2, 4, 6, 8]
    branch = monitor.read(root, "in_context", run="branch")
    assert branch["step"].tolist()[-2:] == [6, 8]
    assert branch["tokens"].tolist()[-1] == 8 * TOKENS_A_BATCH


@pytest.mark.parametrize("schedule", [None, [0, 2], 6])
def test_a_training_with_little_left_to_do_goes_on(fit, dynamics, checkpoint, schedule):
    """No schedule that a run began with keeps its last steps from being trained."""
    module = fit(dynamics(schedule=schedule), checkpoint=checkpoint(8), max_steps=10)
    assert len(module.seen) == 2


def test_a_checkpoint_saved_without_the_callback(fit, dynamics, root, package, tmp_path):
    saving = saver(package, tmp_path / "saved", every_n_train_steps=4)
    fit(saving, enable_checkpointing=True, max_steps=4)
    fit(dynamics(schedule=2), checkpoint=tmp_path / "saved/4.ckpt")
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [4, 6, 8]
    # Nobody counted the tokens of the first four steps: a number would be wrong.
    assert frame["tokens"].isna().all()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_broken_off_can_be_read_and_goes_on(
    fit, dynamics, root, package, tmp_path, error
):
    urls = []

    def stop(trainer, *_):
        urls.append(watching.monitor.url)
        if trainer.global_step == 5:
            raise error("stop")

    watching = dynamics(schedule=1, metrics_port=0)
    saving = saver(package, tmp_path / "saved", every_n_train_steps=4)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((error, SystemExit)):
            fit(watching, hook(package, on_train_batch_end=stop), saving, enable_checkpointing=True)
    finally:
        # Lightning ignores further interrupts from then on.
        signal.signal(signal.SIGINT, before)
    assert steps(root) == [0, 1, 2, 3, 4, 5]
    assert watching.monitor is None
    socket.create_server(("127.0.0.1", urllib.parse.urlsplit(urls[0]).port)).close()
    fit(dynamics(schedule=1), checkpoint=tmp_path / "saved/4.ckpt", max_steps=6)
    assert monitor.read(root, "in_context")["attempt"].tolist() == [1] * 5 + [2] * 2


def test_ctrl_c_in_the_first_measurement_ends_the_run_as_any_later_one(fit, dynamics, root):
    class Stop:
        def write(self, measurement):
            raise KeyboardInterrupt

        def close(self):
            pass

    watching = dynamics(schedule=4, sinks=[Stop()])
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(watching)
    finally:
        signal.signal(signal.SIGINT, before)
    assert watching.monitor is None
    assert steps(root) == [0]
    assert monitor.read(root, "attempts")["ended"].notna().all()


def test_it_measures_a_run_twice_as_long_in_two_fits(dynamics, root, package, tmp_path):
    watching = dynamics(schedule=2)
    module = tiny_class(package)()
    running = trainer(package, tmp_path, callbacks=[watching], max_steps=4)
    running.fit(module, loader())
    assert watching.monitor is None
    running.fit_loop.epoch_loop.max_steps = 8
    running.fit(module, loader())
    assert steps(root) == [0, 2, 4, 6, 8]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (0, 2, 4, 6, 8)]
    assert monitor.read(root, "in_context")["run"].nunique() == 1


def test_a_new_training_with_the_same_callback_is_a_new_run(fit, dynamics, root):
    watching = dynamics(schedule=4)
    fit(watching)
    fit(watching)
    assert steps(root) == [0, 4, 8] * 2
    assert tokens(root) == [0, 4 * TOKENS_A_BATCH, 8 * TOKENS_A_BATCH] * 2
    assert monitor.read(root, "in_context")["run"].nunique() == 2
