"""Where the language model is in a LightningModule, and where held-out text and the number of
training tokens come from: data of all kinds.
"""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import monitor
from monitor.anatomy import NotALanguageModelError
from tests.callbacks.tiny import (
    BATCH,
    CONTEXT,
    LIGHTNING_WARNINGS,
    Stream,
    TinyLM,
    loader,
    text,
    tiny_class,
)
from tests.recorded import attempt, steps, stimulus, tokens

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


# The model


@pytest.fixture
def two_models(package):
    """A student that is trained and a teacher that is not."""

    class Both(tiny_class(package)):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleDict({"teacher": TinyLM(layers=1)})

    return Both()


@pytest.mark.parametrize(
    ("where", "layers"),
    [("net", {0, 1}), ("nets.teacher", {0}), (lambda module: module.nets["teacher"], {0})],
)
def test_the_model_that_is_meant(fit, dynamics, root, two_models, where, layers):
    fit(dynamics(schedule=1, model=where), module=two_models, max_steps=1)
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
def test_models_that_are_not_there(fit, dynamics, two_models, where, error, message):
    with pytest.raises(error, match=message):
        fit(dynamics(model=where), module=two_models)
    assert two_models.seen == []


# Held-out text

IMAGES = DataLoader(TensorDataset(torch.ones(8, 3)), BATCH)
# Integer matrices that nobody offered as text: labels, boxes, scores of pairs.
LABELS = DataLoader(TensorDataset(torch.arange(32).view(8, 4) % 5), BATCH)


@pytest.mark.parametrize(
    "val_of",
    [
        lambda held_out: held_out,
        # The first with token ids.
        lambda held_out: [IMAGES, held_out],
        lambda held_out: {"a": IMAGES, "b": held_out},
    ],
)
def test_held_out_text_comes_from_the_validation_data(fit, dynamics, root, val_of):
    held_out = text(16, seed=4)
    fit(dynamics(schedule=1), val=val_of(loader(held_out)), max_steps=1)
    assert attempt(root)["config"]["text"] == "validation data"
    shown = stimulus(root, "text")
    assert len(shown) == 4
    assert all(row in held_out.tolist() for row in shown)


@pytest.mark.parametrize(
    ("val_of", "context"),
    [
        (lambda: None, 16),
        # What can only be iterated over is left alone.
        (lambda: DataLoader(Stream(), BATCH), None),
        # What is no text does not stop training.
        (lambda: LABELS, None),
        (lambda: LABELS, 16),
    ],
)
def test_without_validation_data_of_use_text_is_the_first_batch(
    fit, dynamics, root, val_of, context
):
    watching = dynamics(schedule=8, context=context, sequences=16)
    module = fit(watching, train=loader(shuffle=True), val=val_of(), limit_val_batches=1)
    assert attempt(root)["config"]["text"] == "first training batch"
    windows = module.seen[0].reshape(-1, context or CONTEXT).tolist()
    shown = stimulus(root, "text")
    assert len(shown) == len(windows)
    assert all(row in windows for row in shown)
    assert len(module.seen) == 8
    assert steps(root) == [0, 8]


@pytest.mark.parametrize(
    ("own", "rows"),
    [
        (lambda: loader(text(16, seed=6), shuffle=True), text(16, seed=6)),
        (lambda: DataLoader(Stream(), BATCH), text(64, seed=8)),
    ],
)
def test_text_from_a_loader_of_ones_own(fit, dynamics, root, own, rows):
    fit(dynamics(schedule=1, text=own()), val=loader(), max_steps=1)
    assert attempt(root)["config"]["text"] == "text="
    assert all(row in rows.tolist() for row in stimulus(root, "text"))


def test_data_without_token_ids_is_said_and_measured_without_text_or_tokens(
    fit, dynamics, root, package, caplog
):
    class Hidden(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch[0].long().squeeze(-1))

    train = DataLoader(TensorDataset(text().float()[..., None]), BATCH)
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        fit(dynamics(schedule=4), module=Hidden(), train=train)
    assert "measuring without held-out text" in caplog.text
    assert set(monitor.read(root, "induction")["validity"]) == {"ok"}
    frame = monitor.read(root, "in_context")
    assert set(frame["validity"]) == {"no held-out text"}
    assert frame["step"].tolist() == [0, 4, 8]
    assert frame["tokens"].isna().tolist() == [False, True, True]


def test_padding_is_not_counted_among_the_tokens(fit, dynamics, root, package):
    rows = [
        {"input_ids": row, "attention_mask": (torch.arange(CONTEXT) < CONTEXT - 4).long()}
        for row in text(64)
    ]

    class Padded(tiny_class(package)):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["input_ids"])

    train = DataLoader(rows, BATCH)
    fit(dynamics(schedule=2, text=text()), module=Padded(), train=train, max_steps=2)
    assert tokens(root) == [0, 2 * BATCH * (CONTEXT - 4)]
