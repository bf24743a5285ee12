"""The callback for the Trainer of transformers: measures while it trains."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from callbacks.watching import HeldOut, Watching
from monitor.concepts import from_tokenizer
from monitor.detection import Notice

_log = logging.getLogger("phasewatch")

# Under this name a checkpoint keeps what belongs to us, among the states of the other callbacks.
_KEY = "phasewatch"


class TrainingDynamics(Watching, TrainerCallback):
    """Watches a language model while a `transformers.Trainer` trains it.

    Arguments, defaults, tables and metrics are those of `callbacks.TrainingDynamics`, which does
    the same for Lightning, with these meanings here:

    Args:
        run: name of the run; default: the one in the checkpoint that training resumes from, else a
            new one.
        text: held-out token ids [sequence, position], or a DataLoader of them; default: taken from
            the evaluation data, else from the training data.
        concepts: what tokens may have or lack; default: what the Trainer's tokenizer (its
            `processing_class`) says of its tokens, as `monitor.concepts.from_tokenizer` does; an
            empty list: none.
        model: where the language model is in the Trainer's model; default: the one module in it
            that maps token ids to logits.

    Raises:
        ValueError, TypeError: an argument is of no use: here, or before the first training step.
        NotALanguageModelError: none, or several, were found: before the first training step.
        NoAttentionError: attention was asked for and the model showed none: likewise.

    Steps are the Trainer's: updates of the weights. Batches are seen by wrapping the Trainer's
    `training_step` while it trains, so that the tokens in them are counted.
    With several processes all measure together, each a part of the sequences, and the first one
    writes: under DDP and FSDP 2. FSDP 1, ZeRO stage 3 and tensor parallelism are refused.
    The Trainer does not say when it is broken off by an error: metrics are then served until it
    trains again or the process ends.
    """

    # While it trains.
    _trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Gets ready to see the first batch."""
        self._let_go()
        self._trainer = trainer = _calling_trainer(self)
        same = [c for c in trainer.callback_handler.callbacks if isinstance(c, TrainingDynamics)]
        self._key = f"{_KEY}.{same.index(self)}" if len(same) > 1 else _KEY
        self._resumed = (state.stateful_callbacks or {}).get(self._key)
        if not isinstance(trainer.training_step, _ShowingStep):
            trainer.training_step = _ShowingStep(trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measures where the schedule says so."""
        self._reached(state.global_step)
        if self._monitor is not None and state.stateful_callbacks is not None:
            # Not by the Trainer's own way, `ExportableState`: with that, it cannot save any more
            # once it went on from a checkpoint that was saved without this callback.
            state.stateful_callbacks[self._key] = self._state()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Measures what was saved."""
        self._saved(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Ends the attempt."""
        self._let_go()

    def see(self, trainer: Any, batch: Any) -> None:
        """Sees a batch that `trainer` is about to train on; begins with the first."""
        if trainer is not self._trainer:
            return
        if self._monitor is None:
            args = trainer.args
            self._begin(
                trainer.model,
                step=trainer.state.global_step,
                last=trainer.state.max_steps,
                held_out=_loaders(trainer),
                batch=batch,
                optimizers=[trainer.optimizer],
                config={
                    "module": type(trainer.model).__name__,
                    "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "32",
                    "accumulate_grad_batches": args.gradient_accumulation_steps,
                },
            )
        self._count(batch)

    def see_loss(self, trainer: Any, loss: Any) -> None:
        """Sees the loss of that batch, of which those of a step add up."""
        if trainer is self._trainer:
            batches = getattr(
                trainer,
                "current_gradient_accumulation_steps",
                trainer.args.gradient_accumulation_steps,
            )
            self._lost(loss, after=trainer.state.global_step, times=batches)

    def _default_concepts(self) -> Sequence[Any]:
        """Those of the Trainer's tokenizer, where it has one."""
        tokenizer = getattr(self._trainer, "processing_class", None)
        # What processes images or sounds may have a tokenizer too.
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if tokenizer is None:
            return ()
        try:
            return from_tokenizer(tokenizer)
        except Exception as error:
            _log.info("no concepts from %s: %s", type(tokenizer).__name__, error)
            return ()

    def _announce(self, notice: Notice) -> None:
        event = notice.event
        try:
            self._trainer.log({f"phasewatch/{event.series}/{event.state}": event.onset})
        except Exception as error:
            _log.warning("the Trainer took no note of a transition: %s", error)

    def _let_go(self) -> None:
        """Ends the attempt that is under way, and gives the Trainer its own step back."""
        self._end()
        showing = vars(self._trainer).get("training_step") if self._trainer is not None else None
        if isinstance(showing, _ShowingStep):
            showing.undo(self._trainer)
        self._trainer = None


class _ShowingStep:
    """A Trainer's `training_step` that shows our callbacks every batch before, and its loss after.

    Callbacks are told of steps, and never see a batch.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._own = trainer.training_step
        self._own_of_the_instance = vars(trainer).get("training_step")
        functools.update_wrapper(self, self._own)

    def __call__(self, model: Any, inputs: Any, *others: Any, **named: Any) -> Any:
        watching = [
            callback
            for callback in self._trainer.callback_handler.callbacks
            if isinstance(callback, TrainingDynamics)
        ]
        for callback in watching:
            callback.see(self._trainer, inputs)
        loss = self._own(model, inputs, *others, **named)
        for callback in watching:
            callback.see_loss(self._trainer, loss)
        return loss

    def undo(self, trainer: Any) -> None:
        del trainer.training_step
        if self._own_of_the_instance is not None:
            trainer.training_step = self._own


def _calling_trainer(callback: TrainerCallback) -> Any:
    """The Trainer that is calling: callbacks are not told which it is."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = getattr(caller, "callback_handler", None)
        if any(one is callback for one in getattr(handler, "callbacks", ())):
            return caller
        frame = frame.f_back
    raise RuntimeError(
        "TrainingDynamics was called by something else than a transformers.Trainer that has it "
        "among its callbacks: pass it as Trainer(callbacks=[...]), and in a loop of your own use "
        "monitor.measure.Monitor"
    )


def _loaders(trainer: Any) -> HeldOut:
    """Where held-out text may be, as the Trainer itself would load it."""
    held_out = trainer.eval_dataset
    names = list(held_out) if isinstance(held_out, dict) else [None]
    evaluation = [
        ("evaluation data", functools.partial(trainer.get_eval_dataloader, name)) for name in names
    ]
    training = ("training data", lambda: trainer.callback_handler.train_dataloader)
    return [*(evaluation if held_out is not None else ()), training]
