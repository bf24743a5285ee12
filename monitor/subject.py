"""A model under measurement: tried out on its stimuli, then measured on them again and again."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from monitor.anatomy import LanguageModel, find_language_model
from monitor.attention import LayerAttention
from monitor.batches import StimulusOptions, build_stimuli, contexts
from monitor.capture import NoAttentionError, Observation, observe, observe_features
from monitor.dictionary import observe_dictionaries
from monitor.divided import ONLY_A_PART
from monitor.evidence import Evidence
from monitor.features import COLLECTORS, OF_LABELS
from monitor.intervening import STIMULI, Interventions
from monitor.memory import Memory
from monitor.optimising import Training
from monitor.parts import Parts, find_parts
from monitor.probes import Probe, with_read
from monitor.ranks import Ranks, is_sharded, portable
from monitor.record import Failure, Measurement, Moment, Reading
from monitor.stimuli import Stimulus
from monitor.streams import Kind, UnseenError
from monitor.untouched import exact

_log = logging.getLogger("phasewatch")

# At how many measurements parts that were not found are looked for.
_SEARCHES = 3

# What is trained on what many passes show, and not collected in one.
_TRAINED = "dictionary"

# What a pass shows only where the parts of the model are known.
_OF_PARTS = {*get_args(Kind), *COLLECTORS, _TRAINED}

# What says much the same on any stimulus, and is observed on the first that a probe names.
_ON_ONE = {"stream", "lens"}


class UnreadableError(ValueError):
    """The model raised on a stimulus; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A model that was tried out, and what it is measured on.

    `root` is the module that was passed for it, `attention_calls` how many a forward pass makes,
    `sharded` whether other processes hold a part of its weights; `memory` is what one measurement
    leaves to the next.
    """

    root: nn.Module
    model: LanguageModel
    stimuli: Mapping[str, Stimulus]
    attention_calls: int | None
    sharded: bool
    memory: Memory = dataclasses.field(default_factory=Memory)

    @classmethod
    def new(
        cls,
        root: nn.Module,
        model: LanguageModel,
        probes: Sequence[Probe],
        options: StimulusOptions,
        ranks: Ranks | None = None,
    ) -> Subject:
        """Builds the stimuli, on the first of several processes, and tries the model on them.

        Raises `ValueError` and `TypeError` where they cannot be built, and what `tried` raises.
        """
        ranks = ranks or Ranks()
        needed = {name for probe in with_read(probes) for name, _ in probe.spec.needs}
        for context in ranks.share(lambda: contexts(model, options)):
            # What each process has of its own, text say, could be different.
            build = functools.partial(build_stimuli, model, options, context, needed)
            stimuli = ranks.share(build)
            try:
                return ranks.agree(functools.partial(cls.tried, root, model, probes, stimuli))
            except UnreadableError as error:
                unreadable = error
        raise unreadable

    @classmethod
    def tried(
        cls,
        root: nn.Module,
        model: LanguageModel,
        probes: Sequence[Probe],
        stimuli: Mapping[str, Stimulus],
    ) -> Subject:
        """Runs one sequence of each stimulus, so that what cannot work is known at once.

        Raises `NoAttentionError`, or `ValueError` where the model cannot read the stimuli.
        """
        attention_calls, sharded = None, is_sharded(model.module)
        for name, wanted in _wanted(with_read(probes), stimuli).items():
            one = stimuli[name].rows(0, 1, torch.device("cpu"))
            # What asks for parts cannot fail: where it cannot be seen its table says why.
            of_any_model = {kind: on for kind, on in wanted.items() if kind not in _OF_PARTS}
            try:
                observation = observe(model, one, **of_any_model, together=sharded)
            except NoAttentionError:
                raise
            except Exception as error:
                raise UnreadableError(
                    f"{type(model.module).__name__} cannot read {one.tokens.shape[1]} token ids "
                    f"({type(error).__name__}: {error}): pass the positions that it can read with "
                    "context=, or the token ids that it knows with vocab_size="
                ) from error
            if observation.attention is not None:
                attention_calls = len(observation.attention)
                _warn_of_unseen(model, observation.attention)
        return cls(
            root=root,
            model=model,
            stimuli=stimuli,
            attention_calls=attention_calls,
            sharded=sharded,
        )

    def measure(
        self,
        probes: Sequence[Probe],
        moment: Moment,
        ranks: Ranks | None = None,
        *,
        seconds: float | None = None,
        training: Training | None = None,
    ) -> Measurement:
        """All probes; what raises becomes a failure of the probes that needed it. Interventions
        take at most so many `seconds` (None: as many as it takes); a probe whose interventions
        these do not pay for has no reading. `training` is what training itself did until then.

        With several processes all of them call this, and the first one has the result.
        """
        ranks, chosen = ranks or Ranks(), {probe.spec.name for probe in probes}
        probes = with_read(probes)
        parts = self._parts(probes)
        observations, broken, observing = self._observed(probes, ranks)
        spent = {probe.spec.name: _share(probe, probes, observing) for probe in probes}
        evidence = Evidence(
            observations=observations,
            previous=self.memory.previous,
            first=self.memory.first,
            parts=parts,
            training=training,
        )
        interventions = Interventions(
            model=self.model,
            sharded=self.sharded,
            parts=parts,
            probes=probes,
            stimuli=self.stimuli,
            ranks=ranks,
            spending=self.memory.spending,
            seconds=None if seconds is None else float(seconds),
            observed=sum(observing.get(name, 0.0) for name in STIMULI),
        )
        readings, failures = [], []
        failed: dict[str, Exception] = {}
        for probe in probes:
            # What runs the model is done by all processes, the rest by the first.
            if not (ranks.first or probe.together):
                continue
            name = probe.spec.name
            missing = [broken[stimulus] for stimulus, _ in probe.spec.needs if stimulus in broken]
            missing += [failed[read] for read in probe.spec.reads if read in failed]
            begun = time.perf_counter()
            try:
                with exact(self.model.device.type):
                    columns = interventions.computed(probe, evidence, *missing[:1])
                if columns is not None:
                    tables = {**evidence.tables, name: columns}
                    evidence = dataclasses.replace(evidence, tables=tables)
                    if name in chosen:
                        readings.append(Reading.build(probe.spec, moment, columns))
            except Exception as error:
                # There may be no time for what is planned: what reads its table does without.
                if not probe.together:
                    failed[name] = error
                if name in chosen and ranks.first:
                    failures.append(Failure.of(name, error))
            spent[name] += time.perf_counter() - begun
        if ranks.first:
            broken_off = interventions.failed.items()
            failures += [Failure.of(name, error) for name, error in broken_off if name in chosen]
        try:
            self.memory.keep(observations)
        except Exception as error:
            failures.append(Failure.of("memory", error))
        return Measurement(
            moment=moment,
            readings=tuple(readings),
            failures=tuple(failures),
            seconds=spent,
            intervening=self.memory.spending.seconds,
        )

    def with_something_to_see(
        self, probes: Sequence[Probe], *, training: bool = False
    ) -> tuple[Probe, ...]:
        """The probes but for those of stimuli, or of labels, that there are none of, and of
        `training` where nobody watches it.
        """
        labels = {name: stimulus.labels for name, stimulus in self.stimuli.items()}
        named = {name for name, its in labels.items() if its is not None and its.names}
        return tuple(
            probe
            for probe in probes
            if (not probe.spec.needs or any(on in self.stimuli for on, _ in probe.spec.needs))
            and all(on in named or kind not in OF_LABELS for on, kind in probe.spec.needs)
            and (training or not probe.spec.training)
        )

    def _observed(
        self, probes: Sequence[Probe], ranks: Ranks
    ) -> tuple[dict[str, Observation], dict[str, Exception], dict[str, float]]:
        """By stimulus, what it showed or what was raised on it, and the seconds that it took."""
        observations: dict[str, Observation] = {}
        broken: dict[str, Exception] = {}
        seconds: dict[str, float] = {}
        for name, kinds in _wanted(probes, self.stimuli).items():
            begun = time.perf_counter()
            try:
                observation = self._observe(self.stimuli[name], kinds, ranks)
                if observation is not None:
                    observations[name] = observation
            except Exception as error:
                broken[name] = error
            seconds[name] = time.perf_counter() - begun
            if _TRAINED in kinds and name in observations:
                begun = time.perf_counter()
                observations[name] = self._with_dictionaries(observations[name])
                seconds[_TRAINED] = time.perf_counter() - begun
        return observations, broken, seconds

    def _parts(self, probes: Sequence[Probe]) -> Parts | None:
        """The parts of the model, where a probe asks for them, with reasons for those missing."""
        kinds = {kind for probe in probes for _, kind in probe.spec.needs}
        if not (kinds & _OF_PARTS or any(probe.spec.weights for probe in probes)):
            return None
        memory = self.memory
        if memory.parts is None or memory.parts.model is not self.model:
            memory.searches = 0
        # Weights that are all zero when training begins hide what they do for a while.
        if memory.searches == 0 or (
            memory.parts is not None and memory.parts.incomplete and memory.searches < _SEARCHES
        ):
            memory.parts = self._found_parts()
            memory.searches += 1
        return memory.parts

    def _found_parts(self) -> Parts:
        if self.sharded:
            return Parts.none(self.model, ONLY_A_PART)
        try:
            return find_parts(self.model)
        except Exception as error:
            return Parts.none(self.model, f"{type(error).__name__}: {error}")

    def _observe(
        self, stimulus: Stimulus, kinds: Mapping[str, Any], ranks: Ranks
    ) -> Observation | None:
        """What the processes saw of their parts of a stimulus, on the first one.

        An error on any of them is raised there.
        """
        if kinds.keys() <= {*COLLECTORS, _TRAINED}:
            return self._collected(stimulus, kinds, ranks)
        start, stop = ranks.rows(len(stimulus.tokens))
        part = stimulus.rows(start, stop, torch.device("cpu"))
        seen: Observation | Exception
        try:
            seen = observe(
                self.model,
                part,
                **kinds,
                parts=self.memory.parts,
                attention_calls=self.attention_calls,
                together=self.sharded,
            )
            # Of the stimulus only its tokens need to travel with it.
            seen = dataclasses.replace(seen, stimulus=dataclasses.replace(part, targets={}))
        except Exception as error:
            seen = portable(error) if ranks.count > 1 else error
        parts = []
        for place, (first, part_seen) in enumerate(ranks.gather((start, seen))):
            if isinstance(part_seen, Exception):
                if ranks.count > 1:
                    part_seen.add_note(f"on process {place} of {ranks.count}")
                raise part_seen
            parts.append((first, part_seen))
        return Observation.join(stimulus, parts) if parts else None

    def _collected(
        self, stimulus: Stimulus, kinds: Mapping[str, Any], ranks: Ranks
    ) -> Observation | None:
        """What is collected of labelled tokens, by the first process alone: what is fitted on some
        of them is used on the others.
        """
        if not ranks.first or self.memory.parts is None:
            return None
        collected = [kind for kind in kinds if kind in COLLECTORS]
        return observe_features(self.memory.parts, stimulus, collected)

    def _with_dictionaries(self, seen: Observation) -> Observation:
        """The observation with dictionaries, or with the reason why there are none: an error in
        their training is no other's.
        """
        memory, features, reasons = self.memory, dict(seen.features), dict(seen.reasons)
        if memory.parts is None:
            return seen
        try:
            features[_TRAINED], memory.dictionaries = observe_dictionaries(
                memory.parts, seen.stimulus, memory.dictionaries
            )
        except UnseenError as error:
            reasons[_TRAINED] = str(error)
        except Exception as error:
            reasons[_TRAINED] = f"{type(error).__name__}: {error}"
        return dataclasses.replace(seen, features=features, reasons=reasons)


def find_model(root: nn.Module, **finding: Any) -> LanguageModel:
    """The language model in `root`, found as `find_language_model` says.

    Raises `ValueError` where its weights are divided in a way that cannot be measured.
    """
    if isinstance(root, nn.Module):
        # Before it runs: divided weights fail in ways that say nothing of the reason.
        is_sharded(root)
    return find_language_model(root, **finding)


def _share(probe: Probe, probes: Sequence[Probe], seconds: Mapping[str, float]) -> float:
    """A probe's seconds of observing: a pass that several use is shared out between them."""

    def passes(of: Probe) -> set[str]:
        return {kind if kind == _TRAINED else stimulus for stimulus, kind in of.spec.needs}

    uses, mine = [passes(each) for each in probes], passes(probe)
    return sum(
        taken / sum(name in used for used in uses)
        for name, taken in seconds.items()
        if name in mine
    )


def _wanted(probes: Sequence[Probe], stimuli: Mapping[str, Stimulus]) -> dict[str, dict[str, Any]]:
    """What to observe on each stimulus, as keywords of `observe`."""
    wanted: dict[str, dict[str, Any]] = {}
    for probe in probes:
        served: set[str] = set()
        for stimulus, kind in probe.spec.needs:
            if stimulus in stimuli and kind not in served:
                wanted.setdefault(stimulus, {})[kind] = True
                served |= {kind} & _ON_ONE
    return wanted


def _warn_of_unseen(model: LanguageModel, layers: Sequence[LayerAttention]) -> None:
    """Says where modules like those that showed attention showed none."""
    seen = {layer.module for layer in layers}
    kinds = {type(module) for path, module in model.module.named_modules() if path in seen}
    unseen = [
        path
        for path, module in model.module.named_modules()
        if type(module) in kinds and not any((s + ".").startswith(path + ".") for s in seen)
    ]
    if unseen:
        _log.warning(
            "%d layers showed their attention, but none was seen in %s: these are missing from "
            "every table (adapters= says how to read them)",
            len(seen),
            ", ".join(unseen),
        )
