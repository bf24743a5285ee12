"""Trains the demo's model with Lightning and the callback, while a terminal shows what happens."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from callbacks import TrainingDynamics
from monitor.across import formations
from monitor.across.printed import print_formations, print_universality
from monitor.attempt import new_run_name
from monitor.concepts import LabelledTokens, python_source
from monitor.demo import corpus
from monitor.demo.model import BATCH, CONTEXT, GRADIENT_NORM, AttentionOnly, optimizer, warm_up
from monitor.demo.story import how_to_query, story
from monitor.demo.view import TerminalView
from monitor.service import Service

_MEASURED_EVERY = 40
_SEQUENCES = 32
_OVERHEAD = 1.0


def run(*, steps: int, seed: int, root: Path, port: int, runs: int = 1) -> None:
    """Trains for `steps` steps, shows it live, and tells at the end what happened.

    With several `runs`, does so once for each seed from `seed` on, and tells at the end in how many
    of them what formed. Ctrl-C stops early, leaves a run that can be read, and begins no other.
    Raises `ValueError` and `OSError` where the arguments are of no use, and `RuntimeError` where
    Python came without its source.
    """
    console = Console()
    with _served(console, root, port):
        _all(console, steps=steps, seed=seed, root=root, port=port, runs=runs)


@contextlib.contextmanager
def _served(console: Console, root: Path, port: int) -> Iterator[None]:
    """Serves the tables for a browser meanwhile, in this process: it costs nothing where nobody
    looks, and ends with the demo however that ends.
    """
    try:
        # Who takes any port for the metrics takes any for this as well.
        service = Service(root) if port else Service(root, port=0)
    except OSError as error:
        console.print(f"[dim]nothing is served for a browser: {error}[/dim]")
        yield
        return
    console.print(f"In a browser, while it trains: {service.url}", highlight=False)
    try:
        yield
    finally:
        service.close()


def _all(console: Console, *, steps: int, seed: int, root: Path, port: int, runs: int) -> None:
    """One run after the other, and what they have in common."""
    console.print("[dim]reading the Python standard library …[/dim]")
    text = corpus.load()
    concepts = python_source(
        text.held_out_texts, text.tokenizer, context=CONTEXT, sequences=2 * _SEQUENCES
    )
    finished: list[str] = []
    for one in range(seed, seed + runs):
        try:
            name, whole, stopped = _train(
                console, text, concepts, steps=steps, seed=one, root=root, port=port
            )
        except KeyboardInterrupt:
            if not finished:
                raise
            break
        if whole:
            finished.append(name)
        if stopped:
            break
        console.print()
    if runs > 1:
        _compare(console, root, finished, runs)


def _compare(console: Console, root: Path, finished: list[str], runs: int) -> None:
    """What the runs that came to their end have in common."""
    if not finished:
        console.print("No run came to its end: there is nothing to compare.")
        return
    of = f"{len(finished)} of {runs} runs" if len(finished) < runs else f"{runs} runs"
    console.print(f"[bold]What formed in the {of} that came to their end[/bold]\n")
    formed = formations(root, finished)
    print_formations(console, formed)
    console.print()
    print_universality(console, formed, "step")
    names = " ".join(f"--run {name}" for name in finished)
    console.print("\nTo see it again:\n")
    console.print(
        f"phasewatch transitions --align --root {root} {names}", soft_wrap=True, highlight=False
    )


def _train(
    console: Console,
    text: corpus.Corpus,
    concepts: LabelledTokens,
    *,
    steps: int,
    seed: int,
    root: Path,
    port: int,
) -> tuple[str, bool, bool]:
    """Trains one run and tells of it; its name, whether it came to its end, and whether Ctrl-C was
    pressed.
    """
    pl.seed_everything(seed, verbose=False)
    training = _Training()
    context = training.model.context
    name = f"demo-seed{seed}-{new_run_name()}"
    view = TerminalView(console, run=name, steps=steps, root=root)
    dynamics = TrainingDynamics(
        root,
        run=name,
        text=_windows(text.held_out, context, stride=context),
        concepts=[concepts],
        schedule=[*range(0, steps, _MEASURED_EVERY), steps],
        # Dense on purpose: who watches for a minute wants to see it happen, and what causes it.
        overhead=_OVERHEAD,
        metrics_port=port,
        seed=seed,
        sequences=_SEQUENCES,
        sinks=[view],
    )
    loader = DataLoader(
        _Rows(_windows(text.train, context + 1, stride=context // 2)),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
    )
    _quiet_lightning()
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[dynamics, _Progress(view, dynamics)],
        gradient_clip_val=GRADIENT_NORM,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begun, stopped = time.perf_counter(), False
    with warnings.catch_warnings(), view:
        warnings.simplefilter("ignore")
        try:
            trainer.fit(training, loader)
        except (KeyboardInterrupt, SystemExit):
            # Lightning would end the process here, and ignore the next Ctrl-C.
            stopped = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
    console.print()
    if view.measurements == 0:
        console.print("Stopped before the first measurement: nothing was recorded.")
        return name, False, stopped
    console.print(story(root, name))
    share = view.seconds / (time.perf_counter() - begun)
    console.print(f"Measuring every {_MEASURED_EVERY} steps took {share:.0%} of the time.")
    console.print(f"\nThe tables are under {root.resolve()}. To query them:\n")
    # Lines as they are, however long: they are there to be copied.
    console.print(how_to_query(root, name), soft_wrap=True, highlight=False)
    console.print("\nTo look at them again in a browser:\n")
    console.print(f"phasewatch serve --root {root}", soft_wrap=True, highlight=False)
    return name, trainer.global_step >= steps, stopped


class _Training(pl.LightningModule):
    """Next-token prediction on rows of `context + 1` tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.model = AttentionOnly()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        chosen = optimizer(self.model)
        return [chosen], [{"scheduler": warm_up(chosen), "interval": "step"}]


class _Progress(pl.Callback):
    """Tells the view how far training has come."""

    def __init__(self, view: TerminalView, dynamics: TrainingDynamics) -> None:
        self._view = view
        self._dynamics = dynamics

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        monitor = self._dynamics.monitor
        self._view.advance(
            trainer.global_step, float(outputs["loss"]), monitor.url if monitor else None
        )


class _Rows(Dataset[Tensor]):
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        return self._rows[index]


def _windows(tokens: Tensor, length: int, *, stride: int) -> Tensor:
    """All windows [window, position] of `length` tokens that begin at multiples of `stride`."""
    return tokens.unfold(0, length, stride)


def _quiet_lightning() -> None:
    """Lightning's notes on hardware and cloud services would tear the live view."""
    for name in ("pytorch_lightning", "lightning.pytorch", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
