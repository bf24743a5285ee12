"""What probes compute, with the ablations that they plan, and the random walks around the weights
that they ask for, within the time that these may take.

Shapes: `batch` sequences; `prediction` one position less than a stimulus has.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from monitor.ablating import Ablation, Means, Stage, ablated_losses, summed
from monitor.anatomy import LanguageModel
from monitor.divided import ONLY_A_PART
from monitor.evidence import Columns, Evidence
from monitor.parts import Parts
from monitor.probes import Probe
from monitor.ranks import LostError, Ranks
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError
from monitor.walks import Options, Sampled, TextLoss, prepared, walked

# The stimuli on which losses are taken.
STIMULI = ("repeated", "text", "text_tail")

# What is observed takes longer than a forward pass. As long as none was timed by itself it is taken
# to be so many times as long, hopefully: what is thought too long is never tried.
_OBSERVED = 2

Ablated = Mapping[Ablation, Mapping[str, Float[Tensor, "batch prediction"]]]
"""By ablation, the losses on each stimulus."""


@dataclass(slots=True, kw_only=True, eq=False)
class Spending:
    """What interventions take, known better with every one that is made.

    `seconds` they took in the latest measurement; `each` is what one forward pass on all stimuli
    does (None: unknown). Walks take much longer than one measurement may: `aside` is what is saved
    up for them, and `gradient` what one gradient on all of the text takes.
    """

    seconds: float = 0.0
    each: float | None = None
    aside: float = 0.0
    gradient: float | None = None

    def set_aside(self, seconds: float, share: float) -> None:
        """Saves up a share of what is new in the seconds that interventions may take: what was set
        aside before is in them, since it was not spent.
        """
        kept = min(self.aside, max(0.0, seconds))
        self.aside = kept + share * max(0.0, seconds - kept)

    def spend_on_walks(self, seconds: float) -> None:
        """Takes note of what walks took."""
        self.seconds += seconds
        self.aside = max(0.0, self.aside - seconds)


@dataclass(slots=True, kw_only=True, eq=False)
class Interventions:
    """The ablations and walks of one measurement; all processes make them together, each on its
    sequences, or its part of the walks.

    They may take `seconds` (None: as long as they do) on the first process, which alone decides;
    `observed` is what the intact model took on the stimuli. `failed` says by the name of a probe
    what broke a later stage of its plan; the stages that were made stay. Where some of the `probes`
    ask for walks, and others for ablations, each have a half of the time, and the walks' is saved
    up until it is enough for all of them.
    """

    model: LanguageModel
    sharded: bool
    parts: Parts | None
    probes: Sequence[Probe]
    stimuli: Mapping[str, Stimulus]
    ranks: Ranks
    spending: Spending
    seconds: float | None
    observed: float
    failed: dict[str, Exception] = field(init=False, default_factory=dict)
    _own: dict[str, tuple[int, Tensor]] = field(init=False, default_factory=dict)
    _means: dict[str, Means] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.spending.seconds = 0.0
        if self.seconds == math.inf:
            self.seconds = None
        if self.seconds is not None and any(probe.walks for probe in self.probes):
            ablating = any(probe.plan for probe in self.probes)
            self.spending.set_aside(self.seconds, 0.5 if ablating else 1.0)
        cpu = torch.device("cpu")
        for name in STIMULI:
            if name in self.stimuli:
                start, stop = self.ranks.rows(len(self.stimuli[name].tokens))
                self._own[name] = start, self.stimuli[name].rows(start, stop, cpu).tokens

    def computed(
        self, probe: Probe, evidence: Evidence, broken: Exception | None = None
    ) -> Columns | None:
        """A probe's columns, on the first process; None where there is no time for what it plans.

        All processes call this for probes that plan, the first one for the others. Raises `broken`,
        by which a pass or a probe that this one needs was broken on that process.
        """
        planning, walks = probe.plan, probe.walks

        def check() -> None:
            if broken is not None:
                raise broken

        if walks is not None:
            self.ranks.share(check)
            try:
                sampled: Sampled | str | None = self._walked(walks)
            except UnseenError as error:
                sampled = str(error)
            if sampled is None or not self.ranks.first:
                return None
            return probe.compute(replace(evidence, sampled=sampled))
        if planning is None:
            check()
            return probe.compute(evidence)

        def plan() -> tuple[Stage, ...]:
            check()
            return planning(evidence)

        ablated = self._ablated(probe.spec.name, plan)
        if ablated is None or not self.ranks.first:
            return None
        return probe.compute(replace(evidence, ablated=ablated))

    def _ablated(self, probe: str, plan: Callable[[], tuple[Stage, ...]]) -> Ablated | None:
        """The losses on the first process; elsewhere none. None where there is no time for even the
        first stage, while nothing planned is soon done.

        A stage is made as a whole, where what is left of the time is enough, or not at all.
        """
        stages = self.ranks.share(plan)
        made: dict[Ablation, dict[str, Tensor]] = {}
        for number, stage in enumerate(stages):
            if not self.ranks.share(functools.partial(self._fits, number, stage)):
                return made if number else None
            begun = time.perf_counter()
            try:
                made |= self._make(stage)
                self.spending.each = (time.perf_counter() - begun) / _passes(number, stage)
            except LostError:
                raise
            except Exception as error:
                # All processes have agreed on it, and go on together.
                if number == 0:
                    raise
                self.failed.setdefault(probe, error)
            finally:
                self.spending.seconds += time.perf_counter() - begun
        return made

    def _fits(self, number: int, stage: Stage) -> bool:
        each = self.spending.each
        if each is None:
            each = self.observed / _OBSERVED
        needed = _passes(number, stage) * each + self.spending.aside
        return self.seconds is None or self.spending.seconds + needed <= self.seconds

    def _walked(self, options: Options) -> Sampled | None:
        """All walks, on the first process; None elsewhere, and where there is no time for them.

        Raises `UnseenError` where there cannot be any.
        """
        if "text" not in self.stimuli:
            raise UnseenError("no held-out text")
        if self.sharded:
            raise UnseenError(ONLY_A_PART)
        enough = functools.partial(self.ranks.share, functools.partial(self._pays_for, options))
        if not enough():
            return None
        begun = time.perf_counter()
        try:
            with ExitStack() as stack:
                inside = TextLoss.of(self.model, self.stimuli["text"].tokens)
                loss = self.ranks.agree(lambda: stack.enter_context(inside))
                self.ranks.share(lambda: self._time(loss))
                if not enough():
                    return None
                setting = self.ranks.share(lambda: prepared(loss, options))
                mine = range(self.ranks.rank, options.chains, self.ranks.count)
                own = self.ranks.agree(
                    lambda: [(n, walked(loss, setting, options, n)) for n in mine]
                )
        finally:
            self.spending.spend_on_walks(time.perf_counter() - begun)
        gathered = [chain for chains in self.ranks.gather(own) for chain in chains]
        chains = sorted(gathered, key=lambda numbered: numbered[0])
        return Sampled(setting=setting, chains=tuple(chain for _, chain in chains))

    def _pays_for(self, options: Options) -> bool:
        """Whether what is set aside is enough, as far as is known: to find out what a gradient
        takes anything is.
        """
        if self.seconds is None:
            return True
        if self.spending.gradient is None:
            return self.spending.aside > 0
        most = -(-options.chains // self.ranks.count)
        passes = options.passes(len(self.stimuli["text"].tokens), most)
        return passes * self.spending.gradient <= self.spending.aside

    def _time(self, loss: TextLoss) -> None:
        """Finds out what a gradient takes, where that is not known."""
        if self.spending.gradient is not None:
            return
        # The first one allocates, and says little.
        for _ in range(2):
            begun = time.perf_counter()
            _, slope = loss.gradient(loss.start, torch.arange(loss.items))
            # A GPU has done what was asked of it when there is a number.
            float(slope[0])
            self.spending.gradient = time.perf_counter() - begun

    def _make(self, stage: Stage) -> dict[Ablation, dict[str, Tensor]]:
        if not self._means:
            self._means = {name: self._mean(name) for name in self._own}
        own = self.ranks.agree(lambda: [self._losses(ablation) for ablation in stage])
        starts = {name: start for name, (start, _) in self._own.items()}
        gathered = self.ranks.gather((starts, own))
        if not gathered:
            return {}
        return {
            ablation: {
                name: _joined([(starts[name], losses[i][name]) for starts, losses in gathered])
                for name in self._own
            }
            for i, ablation in enumerate(stage)
        }

    def _losses(self, ablation: Ablation) -> dict[str, Tensor]:
        return {
            name: ablated_losses(self._known(), tokens, ablation, self._means[name])
            for name, (_, tokens) in self._own.items()
        }

    def _mean(self, name: str) -> Means:
        """What each head mixes on average over a whole stimulus: the same on all processes."""
        start, tokens = self._own[name]
        # Sequences that several processes read are counted by the first of them.
        counted = max(0, self.ranks.rank * len(tokens) - start)
        uncounted = tokens[counted:]
        sums = self.ranks.agree(lambda: summed(self._known(), uncounted) if len(uncounted) else {})
        gathered = self.ranks.gather(sums)
        number = self.stimuli[name].tokens.numel()
        return self.ranks.share(
            lambda: {
                layer: torch.stack([each[layer] for each in gathered if layer in each]).sum(0)
                / number
                for layer in sums
            }
        )

    def _known(self) -> Parts:
        if self.parts is None:
            raise ValueError("heads cannot be ablated in a model whose parts are not known")
        return self.parts


def _passes(number: int, stage: Stage) -> int:
    """How many forward passes a stage takes; the first one of the intact model as well."""
    return sum(ablation.passes for ablation in stage) + (number == 0)


def _joined(parts: list[tuple[int, Tensor]]) -> Float[Tensor, "batch prediction"]:
    """The sequences of all processes, each once, from the parts that begin at some of them."""
    taken: list[Tensor] = []
    total = 0
    for start, part in sorted(parts, key=lambda numbered: numbered[0]):
        taken.append(part[total - start :])
        total = max(total, start + len(part))
    return torch.cat(taken)
