"""Ablation: how much worse the model gets at copying, and at using its context, without some heads.

The induction group is the heads whose prefix matching exceeds its null by more than three standard
errors and by a tenth of what is left to 1, the best ones first: at most a quarter of all heads, and
at most 8. The previous-token group is the same for that score, without the heads of the first. They
write nothing (zero ablation), or the mean of what they mix over the stimulus (mean ablation), or
that with all patterns kept, so that only what flows through values is lost (Olsson et al. 2022).

A group's ablation hurts, whatever it does, so that its effect alone proves nothing: beside it are
those of random groups of the same size, from heads that show neither pattern. `over_random` is what
it hurts more than the worst of them. The random groups are drawn the same way at every step.
Redundant heads stand in for each other: each alone may do little where the group does everything.

Before any head shows the pattern the best one is ablated, with a validity that says so: a series
that begins with the transition would not show it. Losses are compared sequence by sequence, so that
the errors are those of the differences.

Shapes: `batch` sequences; `prediction` one position less than a stimulus has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from monitor.ablating import Ablation, Stage, why_not
from monitor.estimate import pooled_mean
from monitor.evidence import Evidence
from monitor.losses import late_minus_early, whole_minus_tail
from monitor.record import Dim, Field, ProbeSpec
from monitor.stimuli import Stimulus

# A group is compared with at least so many random ones, or with none: the worst of a few says
# little of how bad a random group can be.
_FEWEST_RANDOM = 4
_MOST_RANDOM = 8

_LARGEST_GROUP = 8
_SINGLES = {"prefix_matching": 4, "previous_token": 2}

# Nats that losses in float32 are off: differences of this size are none, however regular.
_ROUNDING = 1e-5

Method = Literal["zero", "mean", "mean_patterns_kept"]
_BOTH: tuple[Method, ...] = ("zero", "mean")
_KEPT: tuple[Method, ...] = ("mean_patterns_kept",)

_RANDOM_GROUPS = "mean over (other) random groups of as many heads, ablated the same way"
_ANY_HARM = "Ablating any heads hurts: compare its null. Redundant heads hide each other's effect."
_NEEDED_ELSEWHERE = "Later layers get what they never saw in training, above all from zeroed heads."

SPEC = ProbeSpec(
    name="ablation",
    help="What is lost as groups of heads are ablated, beside random groups of the same size.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads; "
    "Wang et al. 2022, Interpretability in the Wild (mean ablation)",
    dims=(
        Dim(
            name="group",
            help="`induction`, `previous_token`, `random 1 of size 3` and so on, or `head`.",
            text=True,
        ),
        Dim(name="layer", help="Layer of a single head; -1 for groups."),
        Dim(name="head", help="A single head within its layer; -1 for groups."),
        Dim(
            name="method",
            help="`zero`, `mean` or `mean_patterns_kept`: what the heads write instead.",
            text=True,
        ),
    ),
    fields=(
        Field(
            name="repeat_later",
            help="Increase of the loss on later copies of repeated random tokens.",
            unit="nats",
            null=_RANDOM_GROUPS,
            null_sd=True,
            fooled_by=_ANY_HARM,
        ),
        Field(
            name="score",
            help="Increase of the in-context score, late minus early loss on held-out text.",
            unit="nats",
            null=_RANDOM_GROUPS,
            null_sd=True,
            fooled_by="Late and early tokens may be hurt alike: heads that help both do not show.",
        ),
        Field(
            name="paired_score",
            help="Increase of the paired in-context score: loss with the whole context minus with "
            "its last quarter, on the same targets.",
            unit="nats",
            null=_RANDOM_GROUPS,
            null_sd=True,
            fooled_by="Heads that help with little context as with much do not show.",
        ),
        Field(
            name="over_random",
            help="Effect on repeat_later minus that of the worst (other) random group of its size.",
            unit="nats",
            null="0: it hurts no more than the worst random group",
            fooled_by=_NEEDED_ELSEWHERE,
        ),
        Field(
            name="heads",
            help="The heads of the group, as layer.head, the best ones first.",
            stderr=False,
            text=True,
        ),
    ),
    needs=(("repeated", "losses"), ("text", "losses"), ("text_tail", "losses")),
    reads=("induction",),
    weights=True,
    interventions=True,
)

Head = tuple[int, int]
# Stimuli differ in how many sequences they have, and how long.
Losses = Mapping[str, Float[Tensor, "_batch _prediction"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Heads that are ablated together, under the name that their rows get."""

    name: str
    heads: tuple[Head, ...]
    validity: str = "ok"

    @property
    def place(self) -> Head:
        return self.heads[0] if self.name == "head" else (-1, -1)

    def by(self, method: Method) -> Ablation:
        return Ablation(
            heads=self.heads,
            by="zero" if method == "zero" else "mean",
            patterns_kept=method == "mean_patterns_kept",
        )


def plan(evidence: Evidence) -> tuple[Stage, ...]:
    """The induction group and four random ones; then those with patterns kept; the previous-token
    group; more random groups; single heads.
    """
    groups = _Groups.of(evidence)
    if groups.validity is not None:
        return ()
    stages = [groups.beside_random(groups.named[:1], _BOTH)]
    # Nothing more is asked of a head that is only there to begin a series.
    if groups.named[0].validity == "ok":
        stages.append(groups.beside_random(groups.named[:1], _KEPT))
    stages.append(groups.beside_random(groups.named[1:], _BOTH))
    if groups.named[0].validity == "ok":
        more = groups.random(len(groups.named[0].heads))[_FEWEST_RANDOM:]
        stages.append([group.by(method) for group in more for method in _BOTH])
    stages.append(groups.beside_random(groups.single, _BOTH))
    asked: dict[Ablation, int] = {}
    for number, stage in enumerate(stages):
        for one in stage:
            asked.setdefault(one, number)
    planned = [tuple(a for a, at in asked.items() if at == n) for n in range(len(stages))]
    return tuple(stage for stage in planned if stage)


def compute(evidence: Evidence) -> dict[str, Any]:
    """A row for each group and method that was ablated."""
    groups = _Groups.of(evidence)
    if groups.validity is not None:
        columns: dict[str, Any] = dict.fromkeys(c for f in SPEC.fields for c in f.columns)
        place = {"group": ["induction"], "layer": [-1], "head": [-1], "method": ["zero"]}
        n = [len(evidence.observations["repeated"].stimulus.tokens)]
        return {**columns, **place, "n": n, "validity": [groups.validity]}
    effects = _Effects(evidence)
    rows = []
    for group in groups.all():
        random = groups.random(len(group.heads))
        for method in (*_BOTH, *_KEPT):
            if group.by(method) in evidence.ablated:
                compared = [one.by(method) for one in random if one.by(method) in evidence.ablated]
                rows.append(_row(effects, group, method, compared))
    return {column: [row[column] for row in rows] for column in rows[0]}


def _row(
    effects: _Effects, group: _Group, method: Method, random: Sequence[Ablation]
) -> dict[str, Any]:
    ablation = group.by(method)
    others = [other for other in random if other != ablation]
    validity = group.validity
    if validity == "ok" and len(random) < _FEWEST_RANDOM:
        validity = f"fewer than {_FEWEST_RANDOM} random groups of its size"
    layer, head = group.place
    row = {
        "group": group.name,
        "layer": layer,
        "head": head,
        "method": method,
        "heads": " ".join(f"{layer}.{head}" for layer, head in group.heads),
        "n": effects.sequences,
        "validity": validity,
        **dict.fromkeys(("over_random", "over_random_stderr", "over_random_null")),
    }
    for field in _SCORES:
        row |= effects.beside(field, ablation, others)
    if others:
        worst = max(others, key=effects.harm)
        value, stderr = effects.of("repeat_later", ablation, worst)
        row |= {"over_random": value, "over_random_stderr": stderr, "over_random_null": 0.0}
    return row


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Which heads are ablated together; `validity` says why none can be, or is None.

    `named` are the induction group and, where heads show that pattern, the previous-token group.
    """

    heads: tuple[Head, ...] = ()
    named: tuple[_Group, ...] = ()
    single: tuple[_Group, ...] = ()
    showing: frozenset[Head] = frozenset()
    validity: str | None = None

    @classmethod
    def of(cls, evidence: Evidence) -> _Groups:
        if (why := why_not(evidence.known_parts())) is not None:
            return cls(validity=why)
        table = evidence.tables["induction"]
        heads = tuple(zip(table["layer"], table["head"], strict=True))
        blocks = evidence.known_parts().blocks
        if any(layer >= len(blocks) or head >= (blocks[layer].heads or 0) for layer, head in heads):
            return cls(validity="the layers and heads that attend are not those of the parts found")
        usable = [head for head, v in zip(heads, table["validity"], strict=True) if v == "ok"]
        if not usable:
            return cls(validity=table["validity"][0])
        ranked = {score: _showing(table, heads, usable, score) for score in _SINGLES}
        most = min(_LARGEST_GROUP, max(1, len(heads) // 4))
        induction = _Group(name="induction", heads=tuple(ranked["prefix_matching"][:most]))
        if not induction.heads:
            first = max(usable, key=lambda head: table["prefix_matching"][heads.index(head)])
            why = "no head shows prefix matching"
            induction = _Group(name="induction", heads=(first,), validity=why)
        others = [head for head in ranked["previous_token"] if head not in induction.heads]
        previous = _Group(name="previous_token", heads=tuple(others[:most]))
        best = [head for score, number in _SINGLES.items() for head in ranked[score][:number]]
        return cls(
            heads=heads,
            named=(induction, previous) if previous.heads else (induction,),
            single=tuple(_Group(name="head", heads=(head,)) for head in dict.fromkeys(best)),
            showing=frozenset(head for shown in ranked.values() for head in shown),
        )

    def random(self, size: int) -> list[_Group]:
        """Distinct random groups of as many heads, from those that show neither pattern where they
        are enough for the fewest, and for two that share none; else from all that are in no group.
        The same at every step.
        """
        grouped = {head for group in self.named for head in group.heads}
        pool = set(self.heads) - grouped - self.showing
        if len(pool) < max(2 * size, _FEWEST_RANDOM):
            pool = set(self.heads) - grouped
        number = min(_MOST_RANDOM, math.comb(len(pool), size))
        drawn: dict[tuple[Head, ...], None] = {}
        seed = 0
        while len(drawn) < number:
            # Each a draw among all heads, of which those in the pool count: as heads leave or enter
            # it most groups stay.
            order = np.random.default_rng([size, seed]).permutation(len(self.heads))
            among = [self.heads[at] for at in order if self.heads[at] in pool]
            drawn.setdefault(tuple(sorted(among[:size])))
            seed += 1
        return [
            _Group(name=f"random {number} of size {size}", heads=heads)
            for number, heads in enumerate(drawn, start=1)
        ]

    def beside_random(self, groups: Sequence[_Group], methods: Sequence[Method]) -> list[Ablation]:
        """The groups' ablations, and for each size the fewest random ones."""
        sizes = dict.fromkeys(len(group.heads) for group in groups)
        random = [one for size in sizes for one in self.random(size)[:_FEWEST_RANDOM]]
        return [group.by(method) for group in (*groups, *random) for method in methods]

    def all(self) -> Iterator[_Group]:
        yield from (*self.named, *self.single)
        for size in dict.fromkeys(len(group.heads) for group in (*self.named, *self.single)):
            yield from self.random(size)


def _showing(
    table: Mapping[str, Any], heads: Sequence[Head], usable: Sequence[Head], score: str
) -> list[Head]:
    """The heads whose score exceeds its null, the best first."""
    value, stderr, null = (torch.as_tensor(table[score + s]) for s in ("", "_stderr", "_null"))
    excess = value - null
    shown = (excess > 3 * stderr) & (excess >= 0.1 * (1 - null))
    values = {head: float(value[at]) for at, head in enumerate(heads) if shown[at]}
    return sorted((head for head in usable if head in values), key=lambda head: -values[head])


# What `in_context` compares: for each sequence a sum, over so many predictions.
Sums = tuple[Float[Tensor, " batch"], Num[Tensor, " batch"]]


def _repeat_later(losses: Losses, stimuli: Mapping[str, Stimulus]) -> Sums | None:
    later = stimuli["repeated"].later_copy[:, :-1]
    return (losses["repeated"].double() * later).sum(1), later.sum(1)


def _score(losses: Losses, _stimuli: Mapping[str, Stimulus]) -> Sums | None:
    if "text" not in losses:
        return None
    score = late_minus_early(losses["text"].double())
    return score, torch.ones(len(score))


def _paired_score(losses: Losses, _stimuli: Mapping[str, Stimulus]) -> Sums | None:
    if "text_tail" not in losses:
        return None
    score = whole_minus_tail(losses["text"].double(), losses["text_tail"].double())
    return score, torch.ones(len(score))


_SCORES = {"repeat_later": _repeat_later, "score": _score, "paired_score": _paired_score}


class _Effects:
    """What ablations change, sequence by sequence."""

    def __init__(self, evidence: Evidence) -> None:
        seen = {
            name: evidence.observations[name]
            for name, _ in SPEC.needs
            if name in evidence.observations
        }
        self._stimuli = {name: one.stimulus for name, one in seen.items()}
        self._ablated = evidence.ablated
        self._intact = {name: one.losses for name, one in seen.items() if one.losses is not None}
        self.sequences = min(len(stimulus.tokens) for stimulus in self._stimuli.values())

    def of(
        self, field: str, ablation: Ablation, other: Ablation | None = None
    ) -> tuple[float | None, float | None]:
        """How much more an ablation changes a field than another one (None: than no ablation), and
        the standard error of that.
        """
        sums = _SCORES[field](self._ablated[ablation], self._stimuli)
        without = self._intact if other is None else self._ablated[other]
        compared = _SCORES[field](without, self._stimuli)
        if sums is None or compared is None:
            return None, None
        mean, stderr = pooled_mean(sums[0] - compared[0], sums[1])
        return float(mean), max(float(stderr), _ROUNDING)

    def harm(self, ablation: Ablation) -> float:
        """By how much an ablation raises the loss on later copies. One without a finite loss may
        have done any harm, so that nothing is said to have done more.
        """
        value, _ = self.of("repeat_later", ablation)
        return math.inf if value is None or not math.isfinite(value) else value

    def beside(
        self, field: str, ablation: Ablation, others: Sequence[Ablation]
    ) -> dict[str, float | None]:
        """The columns of a field: an effect, and those of random groups."""
        value, stderr = self.of(field, ablation)
        random = [effect for other in others if (effect := self.of(field, other)[0]) is not None]
        return {
            field: value,
            f"{field}_stderr": stderr,
            f"{field}_null": float(np.mean(random)) if random else None,
            f"{field}_null_sd": float(np.std(random, ddof=1)) if len(random) > 1 else None,
        }
