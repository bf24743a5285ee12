"""TrainingDynamics in real trainings, under both packages that Lightning comes in: what is measured
and when, runs that go on from a checkpoint, data of all kinds, what is refused before the first
step, and that training is bit-identical with and without it.
"""

import importlib
import json
import logging
import random
import signal
import socket
import urllib.parse
import urllib.request

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import monitor
from callbacks import TrainingDynamics
from monitor.anatomy import NotALanguageModelError
from monitor.capture import NoAttentionError
from monitor.measure import Monitor, measure
from tests.callbacks.tiny import (
    BATCH,
    CONTEXT,
    LIGHTNING_WARNINGS,
    PACKAGES,
    TOKENS_A_BATCH,
    VOCABULARY,
    TinyLM,
    loader,
    text,
    tiny_class,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(params=PACKAGES)
def package(request):
    return request.param


@pytest.fixture
def fit(package, tmp_path):
    """Trains a Tiny (or `module`) with callbacks, returns it; other arguments are the trainer's."""

    def fit(*callbacks, module=None, train=None, val=None, checkpoint=None, **more):
        if module is None:
            torch.manual_seed(0)
            module = tiny_class(package)()
        running = trainer(package, tmp_path, callbacks=list(callbacks), **more)
        train = loader() if train is None else train
        resume = {}
        if checkpoint is not None:
            resume = {"ckpt_path": checkpoint}
        running.fit(module, train, val, **resume)
        return module

    return fit


@pytest.fixture
def dynamics(tmp_path):
    """Makes callbacks that write to `root`, with few sequences; metrics only where asked for."""

    def dynamics(**more):
        defaults = {"metrics_port": None, "sequences": 4, "root": tmp_path / "runs"}
        return TrainingDynamics(**(defaults | more))

    return dynamics


@pytest.fixture
def root(tmp_path):
    return tmp_path / "runs"


def of(package: str, name: str):
    """Something of Lightning's, such as `callbacks.ModelCheckpoint`."""
    path, _, attribute = f"{package}.{name}".rpartition(".")
    return getattr(importlib.import_module(path), attribute)


def hook(package: str, **hooks):
    """A callback of the user's own with these hooks."""
    kind = type("Own", (of(package, "Callback"),), {})
    own = kind()
    for name, function in hooks.items():
        setattr(own, name, function)
    return own


def saver(package: str, folder, **more):
    """Saves a checkpoint every so many steps, and keeps all of them."""
    return of(package, "callbacks.ModelCheckpoint")(
        dirpath=folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **more
    )


def steps(root) -> list[int]:
    return monitor.read(root, "in_context")["step"].tolist()


def tokens(root) -> list[float]:
    return monitor.read(root, "in_context")["tokens"].tolist()


def attempt(root) -> dict:
    """The last attempt, with its configuration unpacked."""
    row = monitor.read(root, "attempts").iloc[-1].to_dict()
    return row | {"config": json.loads(row["config"])}


def stimulus(root, name: str) -> list[list[int]]:
    stored = monitor.read(root, "stimuli")
    return stored[stored["stimulus"] == name]["token_ids"].map(list).tolist()


# What is measured, and when


def test_everything_by_default(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Somebody else may use the default one.
    monkeypatch.setitem(TrainingDynamics.__init__.__kwdefaults__, "metrics_port", port)
    torch.manual_seed(0)
    trainer(package, tmp_path, callbacks=[TrainingDynamics()]).fit(tiny_class(package)(), loader())
    assert steps("runs") == [0, 1, 2, 4, 8]
    heads = monitor.read("runs", "induction")
    assert len(heads) == 5 * 4
    assert set(heads["validity"]) == {"ok"}
    assert tokens("runs") == [step * TOKENS_A_BATCH for step in (0, 1, 2, 4, 8)]
    row = attempt("runs")
    assert row["config"]["model"] == "TinyLM"
    assert row["config"]["module"] == "Tiny"
    assert row["config"]["accumulate_grad_batches"] == 1
    assert row["attempt"] == 1


def test_steps_of_a_schedule(fit, dynamics, root):
    fit(dynamics(schedule=3))
    assert steps(root) == [0, 3, 6]
    fit(dynamics(schedule=[2, 5], run="second"))
    assert monitor.read(root, "in_context", run="second")["step"].tolist() == [2, 5]


def test_what_is_measured_is_the_model_after_that_many_steps(fit, dynamics, root, package):
    weights = {}

    def keep(trainer, module, *_):
        weights[trainer.global_step] = {k: v.clone() for k, v in module.net.state_dict().items()}

    fit(dynamics(schedule=2, text=text(seed=5)), hook(package, on_train_batch_end=keep))
    stored = monitor.read(root, "in_context").set_index("step")["score"]
    for step in (2, 4, 6, 8):
        model = TinyLM()
        model.load_state_dict(weights[step])
        expected = measure(model, text=text(seed=5), sequences=4, probes=["in_context"])
        assert stored[step] == expected["in_context"]["score"][0]


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_that_is_saved(fit, dynamics, root, package, tmp_path, weights_only):
    how = {"every_n_train_steps": 3, "save_weights_only": weights_only}
    saving = saver(package, tmp_path / "saved", **how)
    fit(dynamics(schedule=[5], text=text(seed=5)), saving, enable_checkpointing=True, max_steps=9)
    saved = {int(path.stem): path for path in (tmp_path / "saved").glob("*.ckpt")}
    assert set(saved) == {3, 6, 9}
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [3, 5, 6, 9]
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in (3, 5, 6, 9)]
    # The numbers are those of what was saved, to the last bit.
    for step, path in saved.items():
        state = torch.load(path, weights_only=False)["state_dict"]
        model = TinyLM()
        model.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
        expected = measure(model, text=text(seed=5), sequences=4)
        stored = monitor.read(root, "induction").query(f"step == {step}")["prefix_matching"]
        assert stored.tolist() == expected["induction"]["prefix_matching"].tolist()
        score = frame.set_index("step")["score"][step]
        assert score == expected["in_context"]["score"][0]


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
        max_epochs=3,
        max_steps=-1,
    )
    assert steps(root) == [1, 3, 6, 9]
    assert tokens(root) == [step * TOKENS_A_BATCH for step in (1, 3, 6, 9)]


@pytest.mark.parametrize("own_first", [False, True])
def test_a_checkpoint_saved_by_hand(fit, dynamics, root, package, tmp_path, own_first):
    path = tmp_path / "mine.ckpt"

    def save(trainer, *_):
        if trainer.global_step == 4:
            trainer.save_checkpoint(path)

    callbacks = [dynamics(schedule=[7]), hook(package, on_train_batch_end=save)]
    fit(*(reversed(callbacks) if own_first else callbacks))
    assert steps(root) == [4, 7]
    # Whichever of the two comes first.
    assert tokens(root) == [4 * TOKENS_A_BATCH, 7 * TOKENS_A_BATCH]
    state = torch.load(path, weights_only=False)["callbacks"]["TrainingDynamics"]
    assert state["run"] == attempt(root)["run"]
    assert state["tokens"] == 4 * TOKENS_A_BATCH


def test_steps_are_optimizer_steps_when_gradients_accumulate(fit, dynamics, root):
    fit(dynamics(schedule=2), accumulate_grad_batches=4, max_steps=6)
    assert steps(root) == [0, 2, 4, 6]
    assert tokens(root) == [step * 4 * TOKENS_A_BATCH for step in (0, 2, 4, 6)]
    assert attempt(root)["config"]["accumulate_grad_batches"] == 4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(fit, dynamics, root, precision):
    fit(dynamics(schedule=4), precision=precision)
    frame = monitor.read(root, "induction")
    assert set(frame["validity"]) == {"ok"}
    assert frame["prefix_matching"].between(0, 1).all()
    assert set(monitor.read(root, "in_context")["validity"]) == {"ok"}
    assert monitor.tables(root) == ["attempts", "in_context", "induction", "stimuli"]
    assert attempt(root)["config"]["precision"] == precision


def test_sanity_checks_and_validation_measure_nothing(fit, dynamics, root, package, tmp_path):
    module = tiny_class(package)()
    watching = dynamics(schedule=[3])
    running = trainer(package, tmp_path, callbacks=[watching], num_sanity_val_steps=2)
    running.validate(module, loader(), verbose=False)
    assert not root.exists()
    running.fit(module, loader(), loader(text(8)))
    assert steps(root) == [3]
    running.validate(module, loader(), verbose=False)
    assert steps(root) == [3]
    assert len(monitor.read(root, "attempts")) == 1


def test_fast_dev_run_measures_and_writes_nothing(fit, dynamics, root, monkeypatch):
    measured, urls = [], []
    original = Monitor.measure

    def watched(self, model, step, tokens=None):
        given = original(self, model, step, tokens)
        measured.append((step, len(given.readings), len(given.failures)))
        urls.append(self.url)
        return given

    monkeypatch.setattr(Monitor, "measure", watched)
    # With a schedule that would never fire in so short a training.
    fit(dynamics(schedule=[0, 1, 1000], metrics_port=0), fast_dev_run=3)
    assert measured == [(0, 2, 0), (1, 2, 0)]
    assert urls == [None, None]
    assert not root.exists()


def test_it_measures_a_run_twice_as_long_in_two_fits(fit, dynamics, root, package, tmp_path):
    watching = dynamics(schedule=2)
    module = tiny_class(package)()
    running = trainer(package, tmp_path, callbacks=[watching], max_steps=4)
    running.fit(module, loader())
    assert watching.monitor is None
    running.fit_loop.epoch_loop.max_steps = 8
    running.fit(module, loader())
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [0, 2, 4, 6, 8]
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in (0, 2, 4, 6, 8)]
    assert frame["run"].nunique() == 1


def test_a_new_training_with_the_same_callback_is_a_new_run(fit, dynamics, root):
    watching = dynamics(schedule=4)
    fit(watching)
    fit(watching)
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [0, 4, 8] * 2
    assert frame["run"].nunique() == 2
    assert tokens(root) == [0, 4 * TOKENS_A_BATCH, 8 * TOKENS_A_BATCH] * 2


def test_tokens_of_padded_batches_are_counted(fit, dynamics, root, package):
    rows = [
        {"input_ids": row, "attention_mask": (torch.arange(CONTEXT) < CONTEXT - 4).long()}
        for row in text(64)
    ]

    class Padded(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["input_ids"])

    fit(dynamics(schedule=4, text=text()), module=Padded(), train=DataLoader(rows, BATCH))
    per_step = tokens(root)[1] / 4
    assert per_step in (BATCH * CONTEXT, BATCH * (CONTEXT - 4))


def test_tokens_are_unknown_where_a_batch_has_none(fit, dynamics, root, package):
    class Hidden(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0].long().squeeze(-1))

    train = DataLoader(TensorDataset(text().float()[..., None]), BATCH)
    fit(dynamics(schedule=4, text=text()), module=Hidden(), train=train)
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [0, 4, 8]
    assert frame["tokens"].isna().tolist() == [False, True, True]


# Where the model is


class TwoModels:
    """A student that is trained and a teacher that is not."""

    def __new__(cls, package):
        class Both(tiny_class(package)):
            def __init__(self):
                super().__init__()
                torch.manual_seed(3)
                self.nets = nn.ModuleDict({"teacher": TinyLM(layers=1)})

        return Both()


@pytest.mark.parametrize(
    ("where", "layers"),
    [("net", {0, 1}), ("nets.teacher", {0}), (lambda module: module.nets["teacher"], {0})],
)
def test_the_model_that_is_meant(fit, dynamics, root, package, where, layers):
    fit(dynamics(schedule=8, model=where), module=TwoModels(package))
    assert set(monitor.read(root, "induction")["layer"]) == layers


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("network", ValueError, r"model='network': Both has no such attribute .*: net, nets"),
        ("net.lm", ValueError, r"model='net.lm': Both has no such attribute"),
        ("net.forward", TypeError, r"model='net.forward' gave .*, not a module"),
        (lambda module: None, TypeError, r"gave NoneType, not a module"),
        (lambda module: module.nets["teacher"].unembedding, NotALanguageModelError, "Linear"),
        (None, NotALanguageModelError, r"2 language models found in Both: net, nets.teacher;"),
    ],
)
def test_models_that_are_not_there(fit, dynamics, root, package, where, error, message):
    module = TwoModels(package)
    with pytest.raises(error, match=message):
        fit(dynamics(model=where), module=module)
    assert module.seen == []


# Runs that go on


def test_a_run_goes_on_from_a_checkpoint(fit, dynamics, root, package, tmp_path):
    first = dynamics(schedule=1, metrics_port=0)
    saving = saver(package, tmp_path / "saved", every_n_train_steps=4)
    fit(first, saving, enable_checkpointing=True, max_steps=10, val=loader(text(16, seed=1)))
    stimuli = monitor.read(root, "stimuli")["token_ids"].map(list).tolist()
    names = []

    def name(trainer, *_):
        names.append(second.monitor.run)

    # As a new process would: everything is new, and the validation data is another.
    second = dynamics(schedule=1, metrics_port=0)
    fit(
        second,
        hook(package, on_train_batch_end=name),
        checkpoint=tmp_path / "saved/4.ckpt",
        max_steps=12,
        val=loader(text(16, seed=2)),
    )
    frame = monitor.read(root, "in_context")
    assert frame["run"].nunique() == 1
    assert set(names) == {frame["run"][0]}
    assert frame["step"].tolist() == list(range(13))
    assert frame["attempt"].tolist() == [1] * 5 + [2] * 8
    assert frame["tokens"].tolist() == [step * TOKENS_A_BATCH for step in range(13)]
    attempts = monitor.read(root, "attempts")
    assert attempts["attempt"].tolist() == [1, 2]
    assert attempts["resumed_from"].fillna(-1).tolist() == [-1, 4]
    assert monitor.read(root, "stimuli")["token_ids"].map(list).tolist() == stimuli
    aside = sorted(root.glob("_superseded/in_context/run=*/*.parquet"))
    assert [int(path.name.partition(".")[0]) for path in aside] == list(range(5, 11))
    heads = monitor.read(root, "induction")
    assert not heads.duplicated(["step", "layer", "head"]).any()


def test_a_run_goes_on_twice_from_the_same_checkpoint(fit, dynamics, root, package, tmp_path):
    saving = saver(package, tmp_path / "saved", every_n_train_steps=4)
    fit(dynamics(schedule=2), saving, enable_checkpointing=True)
    for _ in range(2):
        fit(dynamics(schedule=2), checkpoint=tmp_path / "saved/4.ckpt")
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [0, 2, 4, 6, 8]
    assert frame["attempt"].tolist() == [1, 1, 1, 3, 3]
    assert sorted(p.name for p in root.glob("_superseded/in_context/run=*/*")) == [
        f"{step:012d}.{times}.parquet" for step in (6, 8) for times in (1, 2)
    ]


def test_a_run_that_is_named_anew_when_it_goes_on(fit, dynamics, root, package, tmp_path):
    saving = saver(package, tmp_path / "saved", every_n_train_steps=4)
    fit(dynamics(schedule=2, run="first"), saving, enable_checkpointing=True)
    fit(dynamics(schedule=2, run="branch"), checkpoint=tmp_path / "saved/4.ckpt")
    assert monitor.read(root, "in_context", run="first")["step"].tolist() == [0, 2, 4, 6, 8]
    branch = monitor.read(root, "in_context", run="branch")
    assert branch["step"].tolist()[-2:] == [6, 8]
    assert branch["tokens"].tolist()[-1] == 8 * TOKENS_A_BATCH


def test_a_checkpoint_saved_without_the_callback(fit, dynamics, root, package, tmp_path):
    fit(saver(package, tmp_path / "saved", every_n_train_steps=4), enable_checkpointing=True)
    fit(dynamics(schedule=2), checkpoint=tmp_path / "saved/4.ckpt")
    frame = monitor.read(root, "in_context")
    assert frame["step"].tolist() == [4, 6, 8]
    # Nobody counted the tokens of the first four steps: a number would be wrong.
    assert frame["tokens"].isna().all()


@pytest.mark.parametrize("schedule", [None, [0, 2], 6])
def test_a_training_with_little_left_to_do_goes_on(
    fit, dynamics, root, package, tmp_path, schedule
):
    """No schedule that a run began with keeps its last steps from being trained."""
    saving = saver(package, tmp_path / "saved", every_n_train_steps=9)
    fit(dynamics(schedule=schedule), saving, enable_checkpointing=True, max_steps=9)
    module = fit(dynamics(schedule=schedule), checkpoint=tmp_path / "saved/9.ckpt", max_steps=11)
    assert len(module.seen) == 2


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


def test_a_probe_that_raises_does_not_stop_training(fit, dynamics, root, monkeypatch, caplog):
    def broken(observations):
        raise ZeroDivisionError("planted")

    watching = dynamics(schedule=2)
    prepare = Monitor.prepare

    def prepare_broken(self, *arguments):
        given = prepare(self, *arguments)
        first, *rest = self._probes
        self._probes = (type(first)(spec=first.spec, compute=broken), *rest)
        return given

    monkeypatch.setattr(Monitor, "prepare", prepare_broken)
    module = fit(watching)
    assert len(module.seen) == 8
    assert steps(root) == [0, 2, 4, 6, 8]
    assert len(monitor.read(root, "failures")) == 5
    assert caplog.text.count("induction failed, training goes on") == 1


# The data


class Stream(IterableDataset):
    """Yields single sequences, and counts how many were taken."""

    def __init__(self, length=64):
        self.length, self.taken = length, 0

    def __iter__(self):
        for sequence in text(self.length, seed=8):
            self.taken += 1
            yield sequence


@pytest.mark.parametrize("kind", ["stream", "shuffled"])
@pytest.mark.parametrize("val", [None, "stream", "shuffled"])
def test_training_sees_the_same_batches(fit, dynamics, kind, val):
    def data(kind):
        if kind == "stream":
            return DataLoader(Stream(), BATCH)
        return None if kind is None else loader(shuffle=True)

    seen, taken = [], []
    for callbacks in ([], [dynamics(schedule=1)]):
        train = data(kind)
        module = fit(*callbacks, train=train, val=data(val))
        seen.append(torch.stack(module.seen).tolist())
        taken.append(getattr(train.dataset, "taken", None))
    assert seen[0] == seen[1]
    assert taken[0] == taken[1]


def test_a_stream_of_unknown_length_for_one_epoch(fit, dynamics, root):
    module = fit(
        dynamics(schedule=4), train=DataLoader(Stream(), BATCH), max_epochs=1, max_steps=-1
    )
    assert len(module.seen) == 16
    assert steps(root) == [0, 4, 8, 12, 16]


def test_held_out_text_comes_from_the_validation_data(fit, dynamics, root):
    held_out = text(16, seed=4)
    fit(dynamics(schedule=8), val=loader(held_out))
    assert attempt(root)["config"]["text"] == "validation data"
    shown = stimulus(root, "text")
    assert len(shown) == 4
    assert all(row in held_out.tolist() for row in shown)


@pytest.mark.parametrize("kind", [list, lambda loaders: dict(zip("ab", loaders, strict=True))])
def test_the_first_validation_data_with_token_ids(fit, dynamics, root, kind):
    held_out = text(16, seed=4)
    images = DataLoader(TensorDataset(torch.ones(8, 3)), BATCH)
    val = kind([images, loader(held_out)])
    fit(dynamics(schedule=8), val=val)
    assert attempt(root)["config"]["text"] == "validation data"
    assert all(row in held_out.tolist() for row in stimulus(root, "text"))


def test_without_validation_data_text_is_the_first_batch(fit, dynamics, root):
    module = fit(dynamics(schedule=8, context=16, sequences=16), train=loader(shuffle=True))
    assert attempt(root)["config"]["text"] == "first training batch"
    windows = module.seen[0].reshape(-1, 16).tolist()
    assert all(row in windows for row in stimulus(root, "text"))


def test_validation_data_that_can_only_be_iterated_is_left_alone(fit, dynamics, root):
    fit(dynamics(schedule=8), val=DataLoader(Stream(), BATCH))
    assert attempt(root)["config"]["text"] == "first training batch"


def test_text_from_a_loader_of_ones_own(fit, dynamics, root):
    held_out = text(16, seed=6)
    fit(dynamics(schedule=8, text=loader(held_out, shuffle=True)), val=loader())
    assert attempt(root)["config"]["text"] == "text="
    assert all(row in held_out.tolist() for row in stimulus(root, "text"))


def test_text_from_a_stream_of_ones_own(fit, dynamics, root):
    fit(dynamics(schedule=8, text=DataLoader(Stream(), BATCH)))
    assert all(row in text(64, seed=8).tolist() for row in stimulus(root, "text"))


def test_data_without_token_ids_is_said_and_measured_without_text(
    fit, dynamics, root, package, caplog
):
    class Hidden(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0].long().squeeze(-1))

    train = DataLoader(TensorDataset(text().float()[..., None]), BATCH)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        fit(dynamics(schedule=8), module=Hidden(), train=train)
    assert "measuring without held-out text" in caplog.text
    assert set(monitor.read(root, "in_context")["validity"]) == {"no held-out text"}
    assert set(monitor.read(root, "induction")["validity"]) == {"ok"}


def test_validation_data_that_is_no_text_does_not_stop_training(fit, dynamics, root):
    """Integer matrices that nobody offered as text: labels, boxes, scores of pairs."""
    labels = DataLoader(TensorDataset(torch.randint(0, 5, (8, 4))), BATCH)
    module = fit(dynamics(schedule=8), val=labels, limit_val_batches=1)
    assert len(module.seen) == 8
    assert steps(root) == [0, 8]


# Metrics


def page(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_metrics_while_it_trains_and_the_port_is_free_afterwards(fit, dynamics, package):
    pages = []

    def look(trainer, *_):
        pages.append((watching.monitor.url, page(watching.monitor.url)))

    watching = dynamics(schedule=1, run="mine", metrics_port=0)
    fit(watching, hook(package, on_train_batch_end=look), max_steps=3)
    for step, (_, text_page) in enumerate(pages, start=1):
        assert f'phasewatch_step{{run="mine"}} {step}.0' in text_page
        assert f'phasewatch_tokens{{run="mine"}} {step * TOKENS_A_BATCH}.0' in text_page
    port = urllib.parse.urlsplit(pages[0][0]).port
    socket.create_server(("127.0.0.1", port)).close()
    assert watching.monitor is None


def test_a_taken_port_does_not_stop_training(fit, dynamics, root, package, caplog):
    urls = []

    def look(trainer, *_):
        urls.append(watching.monitor.url)
        page(watching.monitor.url)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        watching = dynamics(schedule=4, metrics_port=port)
        fit(watching, hook(package, on_train_batch_end=look))
    assert steps(root) == [0, 4, 8]
    assert len(set(urls)) == 1
    assert urllib.parse.urlsplit(urls[0]).port > port
    assert f"port {port} is taken" in caplog.text


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"probes": ["inductoin"]}, ValueError, "known: induction, in_context; did you mean"),
        ({"probes": ["induction.entrpy"]}, ValueError, "did you mean 'entropy'"),
        ({"probes": []}, ValueError, "expected a list of names"),
        ({"run": "../x"}, ValueError, "run name '../x' cannot be used"),
        ({"run": ""}, ValueError, "run name '' cannot be used"),
        ({"schedule": -1}, ValueError, "schedule=-1 never fires"),
        ({"schedule": 0}, ValueError, "schedule=0 never fires"),
        ({"schedule": []}, ValueError, r"schedule=\[\] never fires"),
        ({"schedule": [1, -2]}, ValueError, "never fires"),
        ({"metrics_port": -1}, ValueError, "metrics_port=-1: expected 0 to 65535"),
        ({"metrics_port": 65_536}, ValueError, "metrics_port=65536"),
        ({"text": "some words"}, TypeError, "got str"),
        ({"text": [[1, 2]]}, TypeError, "got list"),
    ],
)
def test_arguments_that_are_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingDynamics(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"schedule": 9}, ValueError, r"never fires in this training, which ends at step 8"),
        ({"schedule": [9, 100]}, ValueError, "pass a smaller schedule="),
        ({"text": text()[0]}, ValueError, r"shape \[32\].*one sequence a row"),
        ({"text": text().float()}, TypeError, r"dtype torch.float32.*not embeddings"),
        ({"text": text()[..., None]}, ValueError, r"shape \[64, 32, 1\]"),
        ({"text": text()[:0]}, ValueError, r"shape \[0, 32\]"),
        ({"text": text() + 1}, ValueError, "token ids from 1 to 32; expected 0 to 31"),
        ({"text": DataLoader(TensorDataset(torch.ones(8, 3)))}, ValueError, "no token ids"),
        ({"context": CONTEXT + 1}, ValueError, f"longer than the {CONTEXT} positions"),
        ({"context": 4}, ValueError, "context=4 is too short"),
        ({"context": 0}, ValueError, "context=0"),
        ({"vocab_size": 99}, ValueError, f"own vocabulary of {VOCABULARY}"),
        ({"sequences": 1}, ValueError, "sequences=1"),
        ({"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_arguments_that_are_refused_before_the_first_step(
    fit, dynamics, root, package, arguments, error, message
):
    module = tiny_class(package)()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=message):
        fit(dynamics(metrics_port=0, **arguments), module=module)
    assert module.seen == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not root.exists() or monitor.tables(root) == []


def test_a_root_that_cannot_be_written_is_refused(fit, dynamics, tmp_path, package):
    (tmp_path / "file").write_text("")
    module = tiny_class(package)()
    with pytest.raises(OSError, match=r"file/runs cannot be written .*root="):
        fit(dynamics(root=tmp_path / "file" / "runs"), module=module)
    assert module.seen == []


def test_a_folder_of_somebody_elses_is_refused(fit, dynamics, root, package):
    root.mkdir()
    pq.write_table(pa.table({"x": [1]}), root / "data.parquet")
    module = tiny_class(package)()
    with pytest.raises(ValueError, match="Parquet files that phasewatch did not write"):
        fit(dynamics(), module=module)
    assert module.seen == []


def test_a_module_without_a_language_model_is_refused(fit, dynamics, package):
    class Regression(of(package, "LightningModule")):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(CONTEXT, 1)

        def training_step(self, batch, batch_idx):
            raise AssertionError("a step was trained")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(NotALanguageModelError, match="no language model found in Regression"):
        fit(dynamics(), module=Regression())


def test_a_model_that_shows_no_attention_is_refused(fit, dynamics, root, package):
    class Bigram(tiny_class(package)):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))

    module = Bigram()
    with pytest.raises(NoAttentionError, match=r"probes=\['in_context'\]"):
        fit(dynamics(), module=module)
    assert module.seen == []
    # And what the message says helps.
    fit(dynamics(schedule=8, probes=["in_context"]), module=Bigram())
    assert steps(root) == [0, 8]


def test_strategies_that_shard_the_model_are_refused(dynamics):
    class FSDPStrategy:
        pass

    class Trainer:
        strategy = FSDPStrategy()

    with pytest.raises(ValueError, match="cannot measure under FSDPStrategy"):
        dynamics().setup(Trainer(), None, "fit")
    dynamics().setup(Trainer(), None, "validate")


# Of Lightning's


def test_it_is_a_callback_of_every_lightning_there_is(dynamics):
    watching = dynamics()
    assert all(isinstance(watching, of(package, "Callback")) for package in PACKAGES)


def test_from_a_command_line(package, tmp_path, root, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    # Lightning calls what jsonargparse has deprecated.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    command_line = of(package, "cli.LightningCLI")
    data = loader()

    class Data(of(package, "LightningDataModule")):
        def train_dataloader(self):
            return data

    command_line(
        tiny_class(package),
        Data,
        save_config_callback=None,
        seed_everything_default=0,
        args=[
            "fit",
            "--trainer.callbacks=callbacks.TrainingDynamics",
            f"--trainer.callbacks.root={root}",
            "--trainer.callbacks.schedule=[2,6]",
            "--trainer.callbacks.probes=[in_context]",
            "--trainer.callbacks.run=007",
            "--trainer.callbacks.model=net",
            "--trainer.callbacks.metrics_port=null",
            "--trainer.max_steps=8",
            "--trainer.accelerator=cpu",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
        ],
    )
    frame = monitor.read(root, "in_context")
    assert frame[["run", "step"]].values.tolist() == [["007", 2], ["007", 6]]


# Training is untouched


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
    """200 steps with dropout; everything that training left behind."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    module = tiny_class(package)(dropout=0.2)
    running = trainer(
        package, folder, callbacks=callbacks, max_steps=200, gradient_clip_val=1.0,
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
def bare(tmp_path_factory):
    """What the training leaves behind without us, for each package."""
    kept = {}

    def bare(package):
        if package not in kept:
            kept[package] = train_jittered(package, tmp_path_factory.mktemp("bare"), [])
        return kept[package]

    return bare


def identical(a, b) -> bool:
    """Whether two nested structures are the same, to the last bit of every tensor."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


@pytest.mark.parametrize("every", [1, 10])
def test_training_is_bit_identical_with_and_without_it(
    package, tmp_path, dynamics, root, bare, every
):
    without = bare(package)
    watching = dynamics(schedule=every, metrics_port=0)
    watched = train_jittered(package, tmp_path, [watching])
    assert len(steps(root)) == 200 // every + 1
    for what, expected in without.items():
        assert identical(expected, watched[what]), what


def test_the_comparison_can_fail(package, tmp_path, bare):
    def draw(trainer, *_):
        if trainer.global_step == 150:
            torch.rand(1)

    disturbed = train_jittered(package, tmp_path, [hook(package, on_train_batch_end=draw)])
    without = bare(package)
    same = {what for what in without if identical(without[what], disturbed[what])}
    assert same.isdisjoint({"weights", "optimizer", "torch", "batches"})
    assert {"python", "modes"} <= same
