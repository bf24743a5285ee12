"""Measuring a model in training: what it shows at each step is recorded, and looked through for
transitions. Once it has begun nothing of it raises.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import torch
from torch import Tensor, nn

from monitor.acting import Acting
from monitor.adapters import ModuleAdapter, check_adapters
from monitor.anatomy import LanguageModel
from monitor.attempt import attempt_row, new_run_name, with_cost
from monitor.batches import StimulusOptions, named_concepts
from monitor.concepts import Named, meanings
from monitor.detection import Notice, Series
from monitor.keeping import CHECKPOINT_BYTES
from monitor.names import check_run_name
from monitor.optimising import OptimiserWatch, Training
from monitor.probes import Probe, select
from monitor.ranks import Ranks, check_alike
from monitor.record import Failure, Measurement, Moment
from monitor.recorder import Recorder
from monitor.sinks import ParquetSink, Sink, check_port
from monitor.stimuli import stimuli_from_arrow, stimuli_to_arrow
from monitor.subject import Subject, find_model
from monitor.tasks import AnyTask

_log = logging.getLogger("phasewatch")

# Seconds between updates of what measuring has cost in the `attempts` table.
_COST_WRITTEN_EVERY = 10


class Monitor:
    """Measures a model at steps of its training and records a run.

    Args:
        root: folder of the tables; None: nothing is written.
        run: name of the run; default: a new one from date and time. The name of an earlier run
            goes on with it: a new attempt, with the stimuli stored then; what earlier attempts
            measured at later steps is set aside.
        resumed_from: the step of the checkpoint that training went on from; default: just before
            the first measurement.
        metrics_port: where to serve metrics (0: any free port); None: nowhere.
        metrics_address: the address to listen on.
        sinks: where measurements go besides; they are closed with the monitor.
        series: numbers to follow besides `monitor.detection.SERIES`, of which it is said when a
            transition begins, holds or goes back: a list of `monitor.detection.Series`.
        false_alarms: so many transitions that are none may be said to begin in 1,000 measurements,
            of all series together; None: nothing is followed.
        checkpoint_bytes: the disk that weights from around transitions may take, under
            `<root>/_checkpoints`; 0: none are kept.
        on_transition: called with each `monitor.detection.Notice` once it is recorded.
        config: whatever else should be written with the attempt (JSON).
        ranks: the processes that measure together; default: all that train together. With `Ranks()`
            each measures for itself, a model of its own say, and needs a run or root of its own.

    With several processes (DDP, FSDP2) make one and call it on each of them, at the same steps,
    once torch.distributed is initialised and the model wrapped. Each reads a part of the stimuli;
    the first computes, writes and serves, and has the measurements. Text, run and stimuli are as it
    says. Where a process does not come within five minutes nothing more is measured.

    `measurements` counts, `measured_seconds` sums the time they took on this process, sinks
    included, and `last_seconds` is that of the latest (None: none yet).

    The other arguments are those of `measure`. Bad arguments raise here or at the first
    measurement, as `measure` says. After that nothing raises: what fails is logged once, counted,
    recorded in the `failures` table, and the rest goes on.
    """

    def __init__(
        self,
        root: str | Path | None = "runs",
        *,
        run: str | None = None,
        probes: Sequence[str] | None = None,
        text: Tensor | None = None,
        concepts: Sequence[Named] | None = None,
        task: AnyTask | None = None,
        vocab_size: int | None = None,
        context: int | None = None,
        sequences: int = 16,
        seed: int = 0,
        adapters: Mapping[type[nn.Module], ModuleAdapter] | None = None,
        resumed_from: int | None = None,
        metrics_port: int | None = None,
        metrics_address: str = "127.0.0.1",
        sinks: Sequence[Sink] = (),
        series: Sequence[Series] = (),
        false_alarms: float | None = 1.0,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        on_transition: Callable[[Notice], object] | None = None,
        config: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = Ranks.here() if ranks is None else ranks
        self._all_processes = ranks is None

        self._acting = self._ranks.agree(
            lambda: Acting(
                series=series,
                false_alarms=false_alarms,
                checkpoint_bytes=0 if root is None else checkpoint_bytes,
                on_transition=on_transition,
            )
        )

        def checked() -> tuple[StimulusOptions, tuple[Probe, ...], dict[Any, ModuleAdapter]]:
            check_port(metrics_port)
            options = StimulusOptions(
                text=text,
                concepts=concepts,
                task=task,
                context=context,
                sequences=sequences,
                seed=seed,
            )
            return options, select(probes), check_adapters(adapters)

        self._options, self._probes, adapters = self._ranks.agree(checked)
        self._finding = {"vocab_size": vocab_size, "adapters": adapters, "task": task}
        self._by_default = probes is None
        self.run = self._ranks.share(lambda: check_run_name(new_run_name() if run is None else run))
        self.attempt = 1
        self.measurements = 0
        self.measured_seconds = 0.0
        self.last_seconds: float | None = None
        # What interventions have left of the time that they may take by default.
        self._saved_seconds = 0.0
        self._resumed_from = resumed_from
        self._metrics = (metrics_address, metrics_port)
        self._config = dict(config or {})
        # The first process alone writes and serves.
        self._store = self._ranks.agree(
            lambda: None if root is None or not self._ranks.first else ParquetSink(root, self.run)
        )
        self._recorder = Recorder(self._store, sinks if self._ranks.first else ())
        self._subject: Subject | None = None
        self._begun = time.perf_counter()
        self._cost_written = self._begun
        self._attempt: pa.Table | None = None
        self._optimisers: OptimiserWatch | None = None
        self._trains = False

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What the latest measurement said of transitions, on the first process."""
        return self._acting.notices

    @property
    def pending(self) -> Mapping[str, float]:
        """By series, the step since which a transition of it has been provisional."""
        return self._acting.pending

    @property
    def url(self) -> str | None:
        """Where the metrics are served, or None."""
        return self._recorder.url

    def prepare(self, model: nn.Module, step: int) -> Subject:
        """Checks everything on the model itself and begins the attempt, before step `step`.

        The first `measure` does this; call it earlier to have bad arguments raised earlier.
        """
        if self._subject is not None:
            return self._subject
        ranks, store = self._ranks, self._store
        if self._all_processes and not ranks.current:
            raise ValueError(
                "torch.distributed was initialised, or ended, after this Monitor was made for "
                f"{ranks.count} processes: make it between the two, on each of them"
            )
        after = ranks.agree(
            lambda: operator.index(step) - 1 if self._resumed_from is None else self._resumed_from
        )
        check_alike(model, ranks)
        found = ranks.agree(lambda: self._find(model))
        stored = ranks.share(lambda: store.stimuli(after) if store is not None else None)
        if stored is None:
            subject = Subject.new(model, found, self._probes, self._options, ranks)
        else:
            stimuli = stimuli_from_arrow(stored)
            subject = ranks.agree(lambda: Subject.tried(model, found, self._probes, stimuli))
            _log.info("run %s goes on with the stimuli stored with it", self.run)
        if self._by_default:
            self._probes = subject.with_something_to_see(self._probes, training=self._trains)
        self.attempt = ranks.share(lambda: self._begin(subject, after, new_stimuli=stored is None))
        self._subject, self._begun = subject, time.perf_counter()
        return subject

    def watch(self, *optimizers: Any, every: int | None = None) -> None:
        """Watches optimisers from now on: before the first measurement, so that it is measured by
        default what they do (the table `optimisation`).

        The update just before a measurement is read where that comes every so many updates, or was
        announced with `expect_update`; of others the table says that they were not. With several
        processes the first one's are read. `close` leaves the optimisers as they were.

        Raises:
            ValueError: what is passed is no optimiser, or `every` is of no use.
        """
        if self._optimisers is not None:
            self._optimisers.close()
        watched = OptimiserWatch(optimizers, every=every)
        self._trains = True
        if self._ranks.first:
            self._optimisers = watched
        else:
            watched.close()

    def expect_update(self, soon: bool = True) -> None:
        """Whether a measurement comes after the next update of the optimisers that are watched."""
        if self._optimisers is not None:
            self._optimisers.expect(soon)

    def measure(
        self,
        model: nn.Module,
        step: int,
        tokens: int | None = None,
        *,
        seconds: float | None = None,
        loss: Any = None,
    ) -> Measurement:
        """Measures `model` at `step`, after `tokens` training tokens, and records it.

        Probes that have the model run again and again, without heads or on other weights, do so in
        `seconds`: 0 for not at all, infinity for as often as they want to. By default they take as
        long as all else does, on average over the measurements: what is not spent is saved up. With
        too little time they have no table at this step. Of several processes the first's counts.
        `loss` is the training loss of the latest step, a number or a tensor of one.

        The first call prepares, and raises what `prepare` raises; later calls never raise.
        """
        subject = self.prepare(model, step)
        moment = Moment(
            run=self.run, attempt=self.attempt, step=step, tokens=tokens, time=datetime.now(UTC)
        )
        measurement = Measurement(moment=moment)
        begun = time.perf_counter()
        try:
            subject = self._ranks.agree(lambda: self._current(subject, model), at=step)
            # What training has queued, and others had to finish, is no cost of measuring.
            if subject.model.device.type == "cuda":
                torch.cuda.synchronize(subject.model.device)
            begun = time.perf_counter()
            allowed = self._saved_seconds if seconds is None else seconds
            training, failed = self._training(moment, loss)
            measurement = subject.measure(
                self._probes, moment, self._ranks, seconds=allowed, training=training
            )
            for each in failed:
                measurement = measurement.with_failure(each)
        except Exception as error:
            measurement = measurement.with_failure(Failure.of("measure", error))
        reading = 0.0 if self._optimisers is None else self._optimisers.seconds()
        if self._ranks.first:
            weights = None if subject.sharded else subject.model.module
            measurement = self._acting.notice(weights, measurement)
        measurement = self._recorder.record(measurement, then=self._acting.tell)
        self.measurements += 1
        before = self.measured_seconds
        self.measured_seconds += time.perf_counter() - begun
        if time.perf_counter() - self._cost_written > _COST_WRITTEN_EVERY:
            self._write_cost()
        self.last_seconds = time.perf_counter() - begun + reading
        self._saved_seconds += self.last_seconds - 2 * measurement.intervening
        self.measured_seconds = before + self.last_seconds
        if self._optimisers is not None:
            self._optimisers.go_on(step=step, tokens=tokens)
        return measurement

    def _training(self, moment: Moment, loss: Any) -> tuple[Training | None, list[Failure]]:
        """What training itself did, None where nobody says; and what failed of reading it."""
        watched, failed, number = self._optimisers, list[Exception](), None
        try:
            if loss is not None:
                number = float(loss.detach() if isinstance(loss, Tensor) else loss)
        except Exception as error:
            failed.append(error)
        training = None if number is None else Training(loss=number)
        try:
            if watched is not None:
                failed += watched.failures()
                training = watched.training(step=moment.step, tokens=moment.tokens, loss=number)
        except Exception as error:
            failed.append(error)
        return training, [Failure.of("optimisers", error) for error in failed]

    def _find(self, model: nn.Module) -> LanguageModel:
        return find_model(model, **self._finding)

    def _current(self, subject: Subject, model: nn.Module) -> Subject:
        """The subject with the model as it is passed now."""
        if subject.root is not model:
            subject = self._subject = replace(subject, root=model, model=self._find(model))
        return subject

    def close(self) -> None:
        """Writes what still waits to be written, and stops serving. Never raises."""
        if self._optimisers is not None:
            self._optimisers.close()
        self._write_cost(ended=datetime.now(UTC))
        self._recorder.close()
        self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _begin(self, subject: Subject, after: int, *, new_stimuli: bool) -> int:
        """Opens the sinks for a new attempt, and returns its number."""
        if self._store is not None:
            self._begin_attempt(self._store, subject, after, new_stimuli=new_stimuli)
        address, port = self._metrics
        info = {"attempt": str(self.attempt), "model": type(subject.model.module).__name__}
        self._recorder.begin(self.run, address=address, port=port, info=info)
        return self.attempt

    def _begin_attempt(
        self, store: ParquetSink, subject: Subject, after: int, *, new_stimuli: bool
    ) -> None:
        self.attempt = store.next_attempt()
        if aside := store.supersede(after):
            _log.warning(
                "run %s goes on after step %d: %d files of earlier attempts beyond it are now "
                "under %s",
                self.run,
                after,
                aside,
                store.superseded,
            )
        self._acting.begin(store.root, self.run, after=after, goes_on=not new_stimuli)
        if new_stimuli:
            store.put("stimuli", 0, stimuli_to_arrow(subject.stimuli))
        self._attempt = attempt_row(
            attempt=self.attempt,
            resumed_from=self._resumed_from,
            seed=self._options.seed,
            parameters=subject.model.parameter_count,
            config={
                "probes": {p.spec.name: [f.name for f in p.spec.fields] for p in self._probes},
                "model": type(subject.model.module).__name__,
                "vocab_size": subject.model.vocab_size,
                "stimuli": {k: list(s.tokens.shape) for k, s in subject.stimuli.items()},
                "concepts": self._meanings(subject),
                **self._config,
            },
        )
        store.put("attempts", self.attempt, self._attempt)

    def _meanings(self, subject: Subject) -> dict[str, str]:
        """By the name of each concept that is looked for, what it is, as far as the user says."""
        said = meanings(self._options.concepts)
        return {name: said.get(name, "") for name in named_concepts(subject.stimuli)}

    def _write_cost(self, ended: datetime | None = None) -> None:
        """Brings the attempt's row up to date; what fails now is written the next time."""
        now = time.perf_counter()
        self._cost_written = now
        if self._store is None or self._attempt is None:
            return
        row = with_cost(
            self._attempt,
            measurements=self.measurements,
            measured_seconds=self.measured_seconds,
            elapsed_seconds=now - self._begun,
            ended=ended,
        )
        with contextlib.suppress(Exception):
            self._store.put("attempts", self.attempt, row, keep=False)
