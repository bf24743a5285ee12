"""One training under watch: what is the same for every trainer."""

from __future__ import annotations

import functools
import logging
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.pace import Pace, check_overhead
from callbacks.schedule import Denser, Schedule
from callbacks.tokens import TokenCount, tokens_in, tokens_of_loader
from monitor.adapters import ModuleAdapter, check_adapters
from monitor.anatomy import LanguageModel, find_language_model
from monitor.concepts import check_concepts, text_rows
from monitor.detection import Notice, Series
from monitor.keeping import CHECKPOINT_BYTES
from monitor.measure import Monitor
from monitor.names import check_run_name
from monitor.probes import select, with_read
from monitor.ranks import LostError, Ranks, check_alike
from monitor.sinks import Sink, check_port
from monitor.stimuli import SHORTEST_CONTEXT, check_text
from monitor.tasks import AnyTask, check_task
from monitor.untouched import untouched

_log = logging.getLogger("phasewatch")

# The share of the overhead budget that is kept for ablating heads.
_RESERVE = 0.25

HeldOut = Sequence[tuple[str, Callable[[], Any]]]
"""Data loaders in which to look for held-out text, in turn: what each is called, and how to get it.
"""


class Watching:
    """Measures a language model while a trainer trains it.

    The trainers' own callbacks inherit this; `callbacks.lightning.TrainingDynamics` documents the
    arguments. They say how training goes, on every process alike: `_begin` before the first step,
    `_count` for each batch, `_reached` after each step, `_saved` for each checkpoint, `_end`. What
    depends on clocks or on the data of a process is decided by the first one for all.
    """

    def __init__(
        self,
        root: str | Path = "runs",
        *,
        run: str | None = None,
        probes: list[str] | None = None,
        text: Any = None,
        concepts: Sequence[Any] | None = None,
        task: AnyTask | None = None,
        schedule: int | list[int] | None = None,
        overhead: float | None = 0.02,
        model: str | Callable[[nn.Module], nn.Module] | None = None,
        vocab_size: int | None = None,
        adapters: Mapping[type[nn.Module], ModuleAdapter] | None = None,
        metrics_port: int | None = 9464,
        metrics_address: str = "127.0.0.1",
        seed: int = 0,
        context: int | None = None,
        sequences: int = 16,
        series: Sequence[Series] = (),
        false_alarms: float | None = 1.0,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        on_transition: Callable[[Notice], object] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        chosen = with_read(select(probes))
        self._intervenes = any(probe.spec.interventions for probe in chosen)
        self._watches = any(probe.spec.training for probe in chosen)
        if run is not None:
            check_run_name(run)
        check_port(metrics_port)
        if text is not None and not isinstance(text, DataLoader):
            check_text(text)
        self._root = Path(root)
        self._run = run
        self._text = text
        self._concepts = None if concepts is None else check_concepts(concepts)
        self._schedule = Schedule.of(schedule)
        self._overhead = check_overhead(overhead)
        self._model = model
        self._finding: dict[str, Any] = {
            "vocab_size": vocab_size,
            "adapters": check_adapters(adapters),
            "task": check_task(task),
        }
        self._measuring: dict[str, Any] = {
            "probes": probes,
            "seed": seed,
            "context": context,
            "sequences": sequences,
            "series": series,
            "false_alarms": false_alarms,
            "checkpoint_bytes": checkpoint_bytes,
            "on_transition": on_transition,
            "metrics_address": metrics_address,
            "sinks": sinks,
        }
        self._port = metrics_port
        self._monitor: Monitor | None = None
        self._resumed: Mapping[str, Any] | None = None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the training that is under way, or None."""
        return self._monitor

    def _begin(
        self,
        module: nn.Module,
        *,
        step: int,
        last: float,
        held_out: HeldOut,
        batch: Any,
        config: Mapping[str, Any],
        optimizers: Sequence[Any] = (),
        dry: bool = False,
    ) -> None:
        """Begins before step `step` of a training that ends at `last`, on all processes.

        The model is looked for in `module`, held-out text in `held_out` and then in the first
        `batch`. In a `dry` training nothing is written.
        What `optimizers` do is read where they are such as torch has.
        """
        resumed = self._resumed if step > 0 else None
        if not dry:
            self._schedule.check_fires(last)
        self._ranks = Ranks.here()
        # Before anything runs: what is divided within its layers may not run as it is.
        check_alike(module, self._ranks)
        model = self._ranks.agree(
            lambda: find_language_model(self._named_module(module), **self._finding)
        )
        text, source = self._ranks.share(lambda: self._find_text(model, held_out, batch))
        monitor = Monitor(
            None if dry else self._root,
            run=self._run or (resumed or {}).get("run"),
            text=text,
            concepts=self._chosen_concepts(text),
            resumed_from=step if resumed else None,
            metrics_port=None if dry else self._port,
            config={
                "schedule": str(self._schedule),
                "overhead": self._overhead,
                "text": source,
                "world_size": self._ranks.count,
                **config,
            },
            ranks=self._ranks,
            **self._finding,
            **self._measuring,
        )
        if self._watches:
            try:
                monitor.watch(*optimizers)
            except Exception as error:
                _log.info("what optimisers do is not measured: %s", error)
        monitor.prepare(model.module, step)
        self._monitor, self._language_model = monitor, model.module
        # Not every trainer says when it is broken off.
        self._closing = weakref.finalize(self, monitor.close)
        known = resumed.get("tokens") if resumed else (0 if step == 0 else None)
        self._tokens = TokenCount(known, processes=self._ranks.count)
        self._measured_step = step if resumed else None
        self._seen_step = step
        self._losses: list[tuple[Any, float]] = []
        self._losses_after = step
        self._denser = Denser(first=step)
        self._pace = Pace(
            overhead=self._overhead,
            schedule=self._schedule,
            first=step,
            last=last,
            reserve=_RESERVE if self._intervenes else 0.0,
        )
        if self._schedule.due(step, since=step - 1):
            self._measure(step)
        self._foresee(step + 1, since=step)

    def _lost(self, loss: Any, *, after: int, times: float) -> None:
        """Takes note of the loss of one batch of the step after `after`: `loss` times `times`."""
        if self._monitor is None:
            return
        if after != self._losses_after:
            self._losses, self._losses_after = [], after
        self._losses.append((loss, times))

    def _loss(self, step: int) -> float | None:
        """The mean loss of the batches of the step that ended at `step`, where all are known."""
        # Of the step that is under way only some of the batches are there.
        if self._losses_after >= step or not self._losses:
            return None
        try:
            known = [float(loss.detach()) * times for loss, times in self._losses]
        except Exception as error:
            _log.debug("no training loss: %s", error)
            return None
        return sum(known) / len(known)

    def _foresee(self, step: int, *, since: int) -> None:
        """Has the updates that come next read, where they are the last before a measurement."""
        if self._monitor is not None:
            due = self._schedule.due(step, since=since) or self._denser.due(step)
            self._monitor.expect_update(due and self._pace.foresees(step))

    def _count(self, batch: Any) -> None:
        """Counts the tokens of a batch that is about to be trained on."""
        if self._monitor is not None:
            self._tokens.add(batch)

    def _reached(self, step: int) -> None:
        """Measures where the schedule says so and the overhead allows it."""
        if self._monitor is None:
            return
        self._pace.reach(step)
        # Steps may be passed over: several optimizers take several at a time.
        due = self._schedule.due(step, since=self._seen_step)
        denser = not due and self._denser.due(step)
        passed, self._seen_step = step - self._seen_step, step
        if (due or denser) and self._measured_step != step and self._admitted(step, extra=denser):
            self._measure(step)
        if passed:
            self._foresee(step + passed, since=step)

    def _saved(self, step: int) -> None:
        """Measures what is, or was, saved."""
        self._measure(step)

    def _state(self) -> dict[str, Any]:
        """What travels in a checkpoint: the run, and the training tokens seen."""
        if self._monitor is None:
            return dict(self._resumed or {})
        return {"run": self._monitor.run, "tokens": self._tokens.value}

    def _end(self) -> None:
        if self._monitor is not None:
            self._resumed = self._state()
            self._pace.finish(self._seen_step)
            self._monitor = None
            self._closing()

    def _admitted(self, step: int, *, extra: bool) -> bool:
        """What the first process decides; its clock is the one that counts."""
        admits = self._pace.admits_extra if extra else self._pace.admits
        try:
            return self._ranks.share(lambda: admits(step))
        except LostError:
            # The monitor says so, and records it.
            return True

    def _measure(self, step: int) -> None:
        """Measures, once for each step."""
        if self._monitor is not None and self._measured_step != step:
            self._measured_step = step
            measurement = self._monitor.measure(
                self._language_model,
                step=step,
                tokens=self._tokens.value,
                seconds=self._pace.grant(step),
                loss=self._loss(step) if self._watches else None,
            )
            self._pace.spend(self._monitor.last_seconds or 0.0, measurement.intervening)
            self._denser.measured(step, pending=self._pending())
            for notice in self._monitor.notices:
                self._announce(notice)

    def _pending(self) -> bool:
        """Whether a transition is provisional, as the first process knows."""
        monitor = self._monitor
        try:
            return monitor is not None and self._ranks.share(lambda: bool(monitor.pending))
        except LostError:
            return False

    def _announce(self, notice: Notice) -> None:
        """Tells the trainer's own log of a transition, on the first process."""

    def _named_module(self, module: nn.Module) -> nn.Module:
        """What the user named to be looked into."""
        if self._model is None:
            found: Any = module
        elif isinstance(self._model, str):
            try:
                found = operator.attrgetter(self._model)(module)
            except AttributeError as error:
                children = ", ".join(name for name, _ in module.named_children())
                raise ValueError(
                    f"model={self._model!r}: {type(module).__name__} has no such attribute "
                    f"({error}); its modules are: {children}"
                ) from error
        else:
            found = self._model(module)
        if not isinstance(found, nn.Module):
            raise TypeError(f"model={self._model!r} gave {type(found).__name__}, not a module")
        return found

    def _find_text(
        self, model: LanguageModel, held_out: HeldOut, batch: Any
    ) -> tuple[Tensor | None, str]:
        """Held-out token ids, and where they are from."""
        if isinstance(self._text, Tensor):
            return self._text, "text="
        sequences = text_rows(self._measuring["sequences"])
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
            for source, loader in held_out:

                def take(loader: Callable[[], Any] = loader) -> Tensor | None:
                    return tokens_of_loader(loader(), sequences=sequences)

                tokens = self._usable(take, model)
                if tokens is not None:
                    return tokens, source
        tokens = self._usable(functools.partial(tokens_in, batch), model)
        if tokens is not None:
            return tokens, "first training batch"
        _log.warning(
            "no token ids found in the data held out or in a training batch (%s): measuring "
            "without held-out text; pass token ids [sequence, position] with text=",
            type(batch).__name__,
        )
        return None, "none"

    def _chosen_concepts(self, text: Tensor | None) -> Sequence[Any]:
        """The concepts to look for, of which the first process alone needs to know."""
        if self._concepts is not None or text is None or not self._ranks.first:
            return self._concepts or ()
        return self._default_concepts()

    def _default_concepts(self) -> Sequence[Any]:
        """The concepts to look for in text where the user names none."""
        return ()

    def _usable(self, take: Callable[[], Tensor | None], model: LanguageModel) -> Tensor | None:
        """What `take` finds where it can serve as text: data may hold matrices of other things."""
        shortest = self._measuring["context"] or SHORTEST_CONTEXT
        try:
            tokens = take()
            if tokens is None or tokens.shape[1] < shortest:
                return None
            return check_text(tokens, vocab_size=model.vocab_size)
        except Exception as error:
            _log.info("no text in data where it was looked for: %s", error)
            return None
