"""A language model small enough to train in a blink, its data, and, for each of the two packages
that Lightning comes in, the same LightningModule, trainer and callbacks.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

VOCABULARY, CONTEXT, BATCH = 32, 32, 4
TOKENS_A_BATCH = BATCH * CONTEXT

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

# Probes of one pass: the others take longer, and change nothing about when and what is recorded.
OBSERVING = ["induction", "in_context"]

# What Lightning says of trainings as small as these, and of itself.
LIGHTNING_WARNINGS = (
    "ignore:.*does not have many workers:Warning",
    "ignore:.*number of training batches .* is smaller than the logging interval:Warning",
    "ignore:You defined a `validation_step` but have no `val_dataloader`:Warning",
    "ignore:Your `val_dataloader`'s sampler has shuffling enabled:Warning",
    # A run goes on without the ModelCheckpoint that saved it.
    "ignore:Be aware that when using `ckpt_path`:UserWarning",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended:Warning",
    # torch deprecated what Lightning asks it.
    "ignore:.*isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


class TinyLM(nn.Module):
    """Token ids [batch, position] to logits: two blocks of two heads, with learned positions."""

    def __init__(self, *, dropout: float = 0.0, layers: int = 2, vocabulary: int = VOCABULARY):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.positions = nn.Embedding(CONTEXT, 16)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(layers))
        self.unembedding = nn.Linear(16, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.unembedding(x)


class Block(nn.Module):
    """Causal self-attention, and nothing else."""

    def __init__(self, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, positions, 3, 2, 8).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(self.out(attended.transpose(1, 2).reshape(x.shape)))


def text(sequences: int = 64, *, seed: int = 0, positions: int = CONTEXT) -> Tensor:
    """Token ids in which every token depends on the one before."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (sequences, positions), generator=random)
    for position in range(1, positions, 2):
        tokens[:, position] = (tokens[:, position - 1] * 5 + 3) % VOCABULARY
    return tokens


def loader(tokens: Tensor | None = None, *, shuffle: bool = False, batch_size: int = BATCH):
    """A DataLoader of batches that are tuples of token ids."""
    tokens = text() if tokens is None else tokens
    return DataLoader(TensorDataset(tokens), batch_size=batch_size, shuffle=shuffle)


class Stream(IterableDataset):
    """Yields single sequences, and counts how many were taken."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        for sequence in text(64, seed=8):
            self.taken += 1
            yield sequence


@functools.cache
def tiny_class(package: str) -> type:
    """The LightningModule of `package` that trains a TinyLM, and keeps what batches it saw."""
    lightning = importlib.import_module(package)

    class Tiny(lightning.LightningModule):
        def __init__(self, dropout: float = 0.0):
            super().__init__()
            self.net = TinyLM(dropout=dropout)
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            tokens = batch if isinstance(batch, Tensor) else batch[0]
            self.seen.append(tokens.clone())
            return self.loss(tokens)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            tokens = batch if isinstance(batch, Tensor) else batch[0]
            if not tokens.is_floating_point():
                self.loss(tokens)

        def loss(self, tokens: Tensor) -> Tensor:
            logits = self.net(tokens[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    return Tiny


def trainer(package: str, folder: Any, **more: Any) -> Any:
    """A trainer that is silent and writes nothing of its own, for 8 steps."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return importlib.import_module(package).Trainer(**(defaults | more))


def train_tiny(
    package: str,
    folder: Any,
    *callbacks: Any,
    module: Any = None,
    train: Any = None,
    val: Any = None,
    checkpoint: Any = None,
    **more: Any,
) -> Any:
    """Trains a Tiny (or `module`) and returns it; other arguments are the trainer's."""
    if module is None:
        torch.manual_seed(0)
        module = tiny_class(package)()
    running = trainer(package, folder, callbacks=list(callbacks), **more)
    train = loader() if train is None else train
    running.fit(module, train, val, **({} if checkpoint is None else {"ckpt_path": checkpoint}))
    return module


def of(package: str, name: str) -> Any:
    """Something of Lightning's, such as `callbacks.ModelCheckpoint`."""
    path, _, attribute = f"{package}.{name}".rpartition(".")
    return getattr(importlib.import_module(path), attribute)


def hook(package: str, **hooks: Any) -> Any:
    """A callback of the user's own with these hooks."""
    own = type("Own", (of(package, "Callback"),), {})()
    for name, function in hooks.items():
        setattr(own, name, function)
    return own


def saver(package: str, folder: Any, **more: Any) -> Any:
    """A ModelCheckpoint that names its files by their steps, and keeps all of them."""
    return of(package, "callbacks.ModelCheckpoint")(
        dirpath=folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **more
    )


def identical(a: Any, b: Any) -> bool:
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
