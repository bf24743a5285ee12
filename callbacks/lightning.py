"""The Lightning callback: measures while a trainer trains."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.watching import Watching
from monitor.detection import Notice

_log = logging.getLogger("phasewatch")


def _callback_classes() -> tuple[type, ...]:
    """The Callback class of every Lightning that is installed.

    `lightning.pytorch` and `pytorch_lightning` are the same code twice, and each accepts only
    callbacks of its own class ("Expected a parent"): this one is both.
    """
    names = ("pytorch_lightning", "lightning.pytorch")
    present = [n for n in names if importlib.util.find_spec(n.partition(".")[0]) is not None]
    return tuple(importlib.import_module(name).Callback for name in present)


class TrainingDynamics(Watching, *_callback_classes()):  # type: ignore[misc]  # the bases depend on what is installed
    """Watches a language model while a Lightning trainer trains it.

    Measures at every checkpoint that is saved and on a schedule, more often while a transition
    begins, writes tables under `root` and serves the latest values as Prometheus metrics. Training
    is bit-identical with and without it.

    Args:
        root: folder of the tables.
        run: name of the run; default: the one in the checkpoint that training resumes from, else a
            new one.
        probes: names of probes, or `probe.field` for single fields; default: all but `dictionary`
            and `learning_coefficient`, and without concepts those of concepts. `default` stands for
            all of these, so that `["default", "dictionary"]` adds one.
        text: held-out token ids [sequence, position], or a DataLoader of them; default: taken from
            the validation data, else from the first training batch as it passes.
        concepts: what tokens may have or lack, a list of `monitor.concepts.Concept`,
            `labelled_texts`, `labelled_tokens`, `python_source` and what `from_tokenizer` returns:
            probes say where in the model these are found. Functions label `text`. `Analogies` in it
            are relations between words. Default: none.
        task: a `monitor.tasks.Task`, questions that are trained on and others that are not, or
            `ModularAddition`: are answers remembered or computed? Without it no `grokking`.
        schedule: None: steps 0, 1, 2, 4, … 512, then every 1,000; a number: every so many steps; a
            list: exactly those steps.
        overhead: the share of the training time that measuring may take. Where the schedule would
            take more, only some of its steps are measured, spread over the whole training; the
            first and every checkpoint are in any case. A quarter of it is kept for ablating heads,
            which is done where that pays for it. None: no limit, all of it at every measurement.
        model: where the language model is in the LightningModule: an attribute path such as
            "net.lm", or a function from the LightningModule to it; default: the one module in it
            that maps token ids to logits.
        vocab_size: number of token ids; default: the model's own.
        adapters: how to read the attention of modules that compute it in a way of their own: from
            their classes to functions; see `monitor.measure.measure`.
        metrics_port: the next free port is used where it is taken; None: no metrics are served.
        metrics_address: loopback unless you say otherwise.
        seed: of what is drawn at random: the tokens of stimuli, and which of the text is for what.
        context: positions per stimulus; default: the model's maximum, at most 256.
        sequences: sequences per stimulus, and so the `n` of every estimate.
        series: numbers to follow besides those of `monitor.detection.SERIES` (the best heads, the
            in-context score, participation ratios, concepts): a list of `monitor.detection.Series`.
            Of each it is said when a transition begins, holds or goes back, in the table
            `transitions` and the trainer's loggers.
        false_alarms: so many transitions that are none may be said to begin in 1,000 measurements,
            of all series together; None: nothing is followed.
        checkpoint_bytes: the disk that weights from around transitions may take, under
            `<root>/_checkpoints`; 0: none are kept.
        on_transition: called with each `monitor.detection.Notice` once it is recorded.
        sinks: where measurements go besides tables and metrics.

    Raises:
        ValueError, TypeError: an argument is of no use: here, or before the first training step.
        NotALanguageModelError: none, or several, were found: before the first training step.
        NoAttentionError: attention was asked for and the model showed none: likewise.

    A checkpoint of weights alone that is saved by hand is not noticed: Lightning tells no callback.
    With several processes all measure together, each a part of the sequences, and the first one
    writes: under DDP and ModelParallelStrategy (fully_shard alone). FSDPStrategy, ZeRO stage 3 and
    tensor parallelism are refused.
    Under `fast_dev_run` everything is measured and nothing is written or served.
    """

    def state_dict(self) -> dict[str, Any]:
        """What travels in a checkpoint: the run, and the training tokens seen."""
        return self._state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the run that a checkpoint belongs to."""
        self._resumed = state_dict

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be measured; no batch is under way yet."""
        self._batch_under_way = False
        strategy = type(trainer.strategy).__name__
        zero_3 = getattr(trainer.strategy, "zero_stage_3", False)
        if stage == "fit" and (strategy == "FSDPStrategy" or zero_3):
            raise ValueError(
                f"TrainingDynamics cannot measure under {strategy}"
                f"{' with ZeRO stage 3' if zero_3 else ''}: no process holds the whole model; "
                "expected a single device, DDP, ZeRO stage 1 or 2, or ModelParallelStrategy with "
                "torch.distributed.fsdp.fully_shard"
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins before the first training step; sees what was saved since the last step."""
        if self._monitor is None:
            self._loggers = () if trainer.fast_dev_run else tuple(trainer.loggers)
            self._begin(
                pl_module,
                step=trainer.global_step,
                last=_last_step(trainer),
                held_out=[
                    ("validation data", functools.partial(_itself, loader))
                    for loader in _flat(trainer.val_dataloaders)
                ],
                batch=batch,
                config={
                    "module": type(pl_module).__name__,
                    "precision": trainer.precision,
                    "accumulate_grad_batches": trainer.accumulate_grad_batches,
                },
                optimizers=trainer.optimizers,
                dry=bool(trainer.fast_dev_run),
            )
        elif self._saved_without_state(trainer):
            self._saved(trainer.global_step)
        # Counted now: other callbacks may save a checkpoint as soon as the batch has ended.
        self._count(batch)
        self._batch_under_way = True
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where the schedule says so."""
        # The trainer has divided it by the number of batches that make a whole step.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        self._lost(loss, after=self._step_before, times=trainer.accumulate_grad_batches)
        self._reached(trainer.global_step)
        self._batch_under_way = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Measures what is being saved."""
        self._saved(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Sees what was saved after the last step."""
        if self._saved_without_state(trainer):
            self._saved(trainer.global_step)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the attempt."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the attempt; before that it measures what a checkpoint callback is about to save."""
        if self._monitor is not None and self._batch_under_way:
            self._tokens.take_back()
        saving = any(getattr(c, "save_on_exception", False) for c in trainer.checkpoint_callbacks)
        # Other processes may not have raised, and then would not measure with this one.
        if saving and trainer.world_size == 1:
            self._saved(trainer.global_step)
        self._end()

    def _announce(self, notice: Notice) -> None:
        event = notice.event
        name = f"phasewatch/{event.series}/{event.state}"
        for logger in self._loggers:
            try:
                logger.log_metrics({name: event.onset}, step=int(event.step))
            except Exception as error:
                _log.warning("%s took no note of a transition: %s", type(logger).__name__, error)

    @staticmethod
    def _saved_without_state(trainer: Any) -> bool:
        """Whether a checkpoint of weights alone was saved at this step: such saves call no hook."""
        return any(
            getattr(callback, "_last_global_step_saved", None) == trainer.global_step > 0
            for callback in trainer.checkpoint_callbacks
        )


def _last_step(trainer: Any) -> float:
    """The step at which training ends, as far as the trainer can say."""
    try:
        last = float(trainer.estimated_stepping_batches)
    except Exception:  # it knows no answer for some ways of accumulating gradients
        return math.inf
    # It says -1 for data without a length.
    return last if last >= 0 else math.inf


def _flat(loaders: Any) -> list[Any]:
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return list(loaders) if isinstance(loaders, Sequence) else [loaders]


def _itself(loader: Any) -> Any:
    return loader
