"""The Lightning callback: measures while a trainer trains."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.schedule import Schedule
from callbacks.tokens import count_tokens, tokens_in, tokens_of_loader
from monitor.anatomy import LanguageModel, find_language_model
from monitor.measure import Monitor
from monitor.probes import select
from monitor.record import check_run_name
from monitor.sinks import Sink, check_port, check_root
from monitor.stimuli import SHORTEST_CONTEXT, check_text
from monitor.untouched import untouched

_log = logging.getLogger("phasewatch")

# Strategies under which one process does not hold the whole model.
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def _callback_classes() -> tuple[type, ...]:
    """The Callback class of every Lightning that is installed.

    `lightning.pytorch` and `pytorch_lightning` are the same code twice, and each accepts only
    callbacks of its own class ("Expected a parent"): this one is both.
    """
    names = ("pytorch_lightning", "lightning.pytorch")
    present = [n for n in names if importlib.util.find_spec(n.partition(".")[0]) is not None]
    return tuple(importlib.import_module(name).Callback for name in present)


class TrainingDynamics(*_callback_classes()):  # type: ignore[misc]  # the bases depend on what is installed
    """Watches a language model while a Lightning trainer trains it.

    Measures at every checkpoint that is saved and on a schedule, writes tables under `root` and
    serves the latest values as Prometheus metrics. Training is bit-identical with and without it.

    Args:
        root: folder of the tables.
        run: name of the run; default: the one in the checkpoint that training resumes from, else a
            new one.
        probes: names of probes, or `probe.field` for single fields; default: all.
        text: held-out token ids [sequence, position], or a DataLoader of them; default: taken from
            the validation data, else from the first training batch as it passes.
        schedule: None: steps 0, 1, 2, 4, … 512, then every 1,000; a number: every so many steps; a
            list: exactly those steps.
        model: where the language model is in the LightningModule: an attribute path such as
            "net.lm", or a function from the LightningModule to it; default: the one module in it
            that maps token ids to logits.
        vocab_size: number of token ids; default: the model's own.
        metrics_port: the next free port is used where it is taken; None: no metrics are served.
        metrics_address: loopback unless you say otherwise.
        seed: of the random tokens on which is measured.
        context: positions per stimulus; default: the model's maximum, at most 256.
        sequences: sequences per stimulus, and so the `n` of every estimate.
        sinks: where measurements go besides tables and metrics.

    Raises:
        ValueError, TypeError: an argument is of no use: here, or before the first training step.
        NotALanguageModelError: none, or several, were found: before the first training step.
        NoAttentionError: attention was asked for and the model showed none: likewise.

    A checkpoint of weights alone that is saved by hand is not noticed: Lightning tells no callback.
    With several processes (DDP) the first one measures. Strategies that shard the model are
    refused.
    Under `fast_dev_run` everything is measured and nothing is written or served.
    """

    def __init__(
        self,
        root: str | Path = "runs",
        *,
        run: str | None = None,
        probes: list[str] | None = None,
        text: Any = None,
        schedule: int | list[int] | None = None,
        model: str | Callable[[nn.Module], nn.Module] | None = None,
        vocab_size: int | None = None,
        metrics_port: int | None = 9464,
        metrics_address: str = "127.0.0.1",
        seed: int = 0,
        context: int | None = None,
        sequences: int = 16,
        sinks: Sequence[Sink] = (),
    ) -> None:
        select(probes)
        if run is not None:
            check_run_name(run)
        check_port(metrics_port)
        if text is not None and not isinstance(text, DataLoader):
            check_text(text)
        self._root = Path(root)
        self._run = run
        self._text = text
        self._schedule = Schedule.of(schedule)
        self._model = model
        self._arguments: dict[str, Any] = {
            "probes": probes,
            "vocab_size": vocab_size,
            "seed": seed,
            "context": context,
            "sequences": sequences,
            "metrics_address": metrics_address,
            "sinks": sinks,
        }
        self._port = metrics_port
        self._monitor: Monitor | None = None
        self._language_model = nn.Module()
        self._resumed: Mapping[str, Any] | None = None
        self._tokens: int | None = 0
        self._measured_step: int | None = None
        self._seen_step = -1
        self._tokens_under_way = 0

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the training that is under way, or None."""
        return self._monitor

    def state_dict(self) -> dict[str, Any]:
        """What travels in a checkpoint: the run, and the training tokens seen."""
        if self._monitor is None:
            return dict(self._resumed or {})
        return {"run": self._monitor.run, "tokens": self._tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the run that a checkpoint belongs to."""
        self._resumed = state_dict

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be measured, or could not be written."""
        strategy = type(trainer.strategy).__name__
        if stage == "fit" and strategy in _SHARDED:
            raise ValueError(
                f"TrainingDynamics cannot measure under {strategy}: no process holds the whole "
                "model; expected a single device or DDP"
            )
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:
            check_root(self._root)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins before the first training step; sees what was saved since the last step."""
        if not trainer.is_global_zero:
            return
        if self._monitor is None:
            self._begin(trainer, pl_module, batch)
        elif self._saved_without_state(trainer):
            self._measure(trainer)
        # Counted now: other callbacks may save a checkpoint as soon as the batch has ended.
        tokens = count_tokens(batch)
        self._tokens_under_way = (tokens or 0) * trainer.world_size
        if tokens is None or self._tokens is None:
            self._tokens = None
        else:
            self._tokens += self._tokens_under_way

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where the schedule says so."""
        # Steps may be passed over: several optimizers take several at a time.
        if self._schedule.due(trainer.global_step, since=self._seen_step):
            self._measure(trainer)
        self._seen_step = trainer.global_step
        self._tokens_under_way = 0

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Measures what is being saved."""
        self._measure(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Sees what was saved after the last step."""
        if self._saved_without_state(trainer):
            self._measure(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Ends the attempt."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends the attempt; before that it measures what a checkpoint callback is about to save."""
        if self._tokens is not None:
            self._tokens -= self._tokens_under_way
        if any(getattr(c, "save_on_exception", False) for c in trainer.checkpoint_callbacks):
            self._measure(trainer)
        self._end()

    def _begin(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        step = trainer.global_step
        resumed = self._resumed if step > 0 else None
        dry = bool(trainer.fast_dev_run)
        if not dry:
            self._schedule.check_fires(_last_step(trainer))
        run = self._run or (resumed or {}).get("run")
        model = find_language_model(
            self._named_module(pl_module), vocab_size=self._arguments["vocab_size"]
        )
        text, source = self._find_text(trainer, model, batch)
        monitor = Monitor(
            None if dry else self._root,
            run=run,
            text=text,
            resumed_from=step if resumed else None,
            metrics_port=None if dry else self._port,
            config={
                "schedule": str(self._schedule),
                "text": source,
                "module": type(pl_module).__name__,
                "precision": trainer.precision,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
                "world_size": trainer.world_size,
            },
            **self._arguments,
        )
        monitor.prepare(model.module, step)
        self._monitor, self._language_model = monitor, model.module
        self._tokens = resumed.get("tokens") if resumed else (0 if step == 0 else None)
        self._measured_step = step if resumed else None
        self._seen_step = step
        if self._schedule.due(step, since=step - 1):
            self._measure(trainer)

    def _end(self) -> None:
        if self._monitor is not None:
            self._resumed = self.state_dict()
            self._monitor.close()
            self._monitor = None

    def _measure(self, trainer: Any) -> None:
        """Measures, once for each step."""
        if self._monitor is not None and self._measured_step != trainer.global_step:
            self._measured_step = trainer.global_step
            self._monitor.measure(
                self._language_model, step=trainer.global_step, tokens=self._tokens
            )

    def _named_module(self, pl_module: Any) -> nn.Module:
        """What the user named to be looked into."""
        if self._model is None:
            found = pl_module
        elif isinstance(self._model, str):
            try:
                found = operator.attrgetter(self._model)(pl_module)
            except AttributeError as error:
                children = ", ".join(name for name, _ in pl_module.named_children())
                raise ValueError(
                    f"model={self._model!r}: {type(pl_module).__name__} has no such attribute "
                    f"({error}); its modules are: {children}"
                ) from error
        else:
            found = self._model(pl_module)
        if not isinstance(found, nn.Module):
            raise TypeError(f"model={self._model!r} gave {type(found).__name__}, not a module")
        return found

    def _find_text(
        self, trainer: Any, model: LanguageModel, batch: Any
    ) -> tuple[Tensor | None, str]:
        """Held-out token ids, and where they are from."""
        if isinstance(self._text, Tensor):
            return self._text, "text="
        sequences = self._arguments["sequences"]
        with untouched(model.module):
            if self._text is not None:
                tokens = tokens_of_loader(self._text, sequences=sequences)
                if tokens is None:
                    tokens = tokens_in(next(iter(self._text)))
                if tokens is None:
                    raise ValueError(
                        "text=: the DataLoader yields no token ids: expected batches that are, or "
                        "hold, an integer tensor [sequence, position]"
                    )
                return tokens, "text="
            for loader in _flat(trainer.val_dataloaders):
                take = functools.partial(tokens_of_loader, loader, sequences=sequences)
                tokens = self._usable(take, model)
                if tokens is not None:
                    return tokens, "validation data"
        tokens = self._usable(functools.partial(tokens_in, batch), model)
        if tokens is not None:
            return tokens, "first training batch"
        _log.warning(
            "no token ids found in the validation data or in a training batch (%s): measuring "
            "without held-out text; pass token ids [sequence, position] with text=",
            type(batch).__name__,
        )
        return None, "none"

    def _usable(self, take: Callable[[], Tensor | None], model: LanguageModel) -> Tensor | None:
        """What `take` finds where it can serve as text: data may hold matrices of other things."""
        try:
            tokens = take()
            if tokens is None or tokens.shape[1] < (self._arguments["context"] or SHORTEST_CONTEXT):
                return None
            return check_text(tokens, vocab_size=model.vocab_size)
        except Exception as error:
            _log.info("no text in data where it was looked for: %s", error)
            return None

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
