"""What ablating heads does to the behaviours that they are said to cause.

A head is ablated by taking what it mixes away (`zero`), or by giving it the mean of what it mixes
over the stimulus (`mean`), which leaves the model nearer to what it was trained on; with the
patterns of all heads kept as they were (`mean_patterns_kept`) only what it writes to the logits or
to values is lost, and what others attend to is not (Olsson et al. 2022). The effects are the
increases of `repeat_later`, `score` and `paired_score` of `in_context`, on the same sequences.

Heads are chosen by their attention: the `induction` group by prefix matching, the `previous_token`
group by that score, and random groups of the same sizes from heads that show neither.

What fools it: any head may matter, so that an effect counts only beside those of random groups
(`over_random`); heads that take over for each other hide in single ablations; and zero is nothing
that a head ever writes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from monitor.ablating import Ablation, why_not
from monitor.capture import Observation
from monitor.estimate import pooled_mean
from monitor.evidence import Evidence
from monitor.losses import late_minus_early, whole_minus_tail
from monitor.record import Dim, Field, ProbeSpec

_RANDOM = "mean over random groups of as many heads, ablated in the same way"
_NO_WORSE = "0: no worse than the worst random group"

SPEC = ProbeSpec(
    name="ablation",
    help="What the loss on repeated tokens and the in-context scores become without some heads, "
    "beside random groups of as many.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads",
    dims=(
        Dim(name="group", help="induction, previous_token, random 1 …, or head.", text=True),
        Dim(name="layer", help="Of a single head; -1 for groups."),
        Dim(name="head", help="Of a single head within its layer; -1 for groups."),
        Dim(name="method", help="zero, mean or mean_patterns_kept.", text=True),
    ),
    fields=(
        Field(
            name="heads",
            help="The heads of the group, as layer.head.",
            fooled_by="They were chosen by their attention on the same stimulus.",
            stderr=False,
            text=True,
        ),
        Field(
            name="repeat_later",
            help="Increase of the loss on later copies of repeated random tokens.",
            unit="nats",
            null=_RANDOM,
            null_sd=True,
            fooled_by="Heads that take over for each other: single heads may show little.",
        ),
        Field(
            name="score",
            help="Increase of the in-context score on held-out text, late minus early.",
            unit="nats",
            null=_RANDOM,
            null_sd=True,
            fooled_by="A model that gets worse everywhere has another score too.",
        ),
        Field(
            name="paired_score",
            help="Increase of the in-context score on held-out text, on the same targets.",
            unit="nats",
            null=_RANDOM,
            null_sd=True,
            fooled_by="A model that gets worse everywhere has another score too.",
        ),
        Field(
            name="over_random",
            help="How much more the loss on later copies rises than for the worst random group.",
            unit="nats",
            null=_NO_WORSE,
            fooled_by="Few random groups have a low worst one.",
        ),
    ),
    needs=(("repeated", "losses"), ("text", "losses"), ("text_tail", "losses")),
    reads=("induction",),
    weights=True,
    interventions=True,
)

# As for the labels of heads: beyond 3 standard errors, and a tenth of what it could be.
_DEVIATIONS, _LEAST_EXCESS = 3.0, 0.1
_MOST_HEADS = 8
_FIRST_RANDOM, _MOST_RANDOM = 4, 8
_SINGLES = 4

Head = tuple[int, int]

_METHODS = {
    "zero": ("zero", False),
    "mean": ("mean", False),
    "mean_patterns_kept": ("mean", True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Heads that are ablated together. `shown`: they do attend as the group's name says."""

    name: str
    heads: tuple[Head, ...]
    shown: bool = True

    def by(self, method: str) -> Ablation:
        kind, kept = _METHODS[method]
        return Ablation(heads=self.heads, by=kind, patterns_kept=kept)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Design:
    """The groups of one measurement; random ones by their size."""

    induction: _Group
    previous: _Group
    singles: tuple[_Group, ...]
    random: Mapping[int, tuple[_Group, ...]]

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> _Design:
        """Chosen by the patterns in a table of `induction`."""
        every = list(zip(map(int, table["layer"]), map(int, table["head"]), strict=True))
        prefix, inducing = _ranked(table, "prefix_matching", every)
        before, previous = _ranked(table, "previous_token", every)
        most = min(_MOST_HEADS, max(1, len(every) // 4))
        first = _Group(
            name="induction",
            heads=tuple((inducing or prefix)[: most if inducing else 1]),
            shown=bool(inducing),
        )
        rest = [head for head in before if head not in first.heads and head not in inducing]
        shown = [head for head in rest if head in previous]
        second = _Group(
            name="previous_token",
            heads=tuple((shown or rest)[: most if shown else 1]),
            shown=bool(shown),
        )
        singles = dict.fromkeys([*prefix[:_SINGLES], *before[: _SINGLES // 2]])
        plain = [head for head in every if head not in {*inducing, *previous}]
        sizes = {len(first.heads), len(second.heads), 1} - {0}
        chosen = {*first.heads, *second.heads}
        return cls(
            induction=first,
            previous=second,
            singles=tuple(_Group(name="head", heads=(head,)) for head in singles),
            random={size: _random(size, plain, every, chosen) for size in sorted(sizes)},
        )

    def stages(self) -> Iterator[tuple[Ablation, ...]]:
        """What to ablate, the most telling first; each stage says something by itself."""
        rival = self.random[len(self.induction.heads)]
        rivals, kept = [self.induction, *rival[:_FIRST_RANDOM]], "mean_patterns_kept"
        yield _each(rivals, "mean", "zero")
        if self.previous.heads:
            others = self.random[len(self.previous.heads)][:_FIRST_RANDOM]
            yield _each([self.previous, *others], "mean", "zero")
        yield _each(rivals, kept)
        yield _each(rival[_FIRST_RANDOM:], "mean", "zero")
        yield _each([*self.singles[:1], *self.random[1][:_FIRST_RANDOM]], "mean", "zero")
        for single in self.singles[1:]:
            yield _each([single], "mean", "zero")

    def groups(self) -> list[_Group]:
        """All of them."""
        random = list(itertools.chain(*self.random.values()))
        numbered = [
            _Group(name=f"random {number}", heads=group.heads)
            for number, group in enumerate(random, start=1)
        ]
        return [self.induction, self.previous, *numbered, *self.singles]


def plan(evidence: Evidence) -> tuple[tuple[Ablation, ...], ...]:
    """Stages of ablations, the most telling first; none where the model's heads cannot be."""
    if why_not(evidence.known_parts()) is not None:
        return ()
    stages, planned = [], set[Ablation]()
    for stage in _Design.of(evidence.tables["induction"]).stages():
        new = tuple(ablation for ablation in stage if ablation not in planned)
        planned |= set(new)
        if new:
            stages.append(new)
    return tuple(stages)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for each ablation that was made; one that says why, where none can be."""
    why = why_not(evidence.known_parts())
    batch = len(evidence.observations["repeated"].stimulus.tokens)
    if why is not None:
        return _nothing(batch, why)
    design = _Design.of(evidence.tables["induction"])
    effects = {a: _effects(evidence, losses) for a, losses in evidence.ablated.items()}
    rows = []
    for group, method in itertools.product(design.groups(), _METHODS):
        if group.heads and group.by(method) in effects:
            random = [g.by(method) for g in design.random[len(group.heads)]]
            others = [a for a in random if a in effects and a != group.by(method)]
            rows.append(_row(group, method, batch, effects, others))
    columns = dict.fromkeys([*(d.name for d in SPEC.dims), "n", "validity"]) | {
        column: None for field in SPEC.fields for column in field.columns
    }
    return {column: [row.get(column) for row in rows] for column in columns}


def _nothing(batch: int, why: str) -> dict[str, Any]:
    return {
        **{column: None for field in SPEC.fields for column in field.columns},
        "group": ["induction"],
        "layer": [-1],
        "head": [-1],
        "method": ["mean"],
        "n": [batch],
        "validity": [why],
    }


def _ranked(
    table: Mapping[str, Any], field: str, every: Sequence[Head]
) -> tuple[list[Head], list[Head]]:
    """All heads by a score's excess over its null, the best first; then those that do exceed it."""
    value, null, stderr = (
        torch.as_tensor(table[f"{field}{part}"], dtype=torch.float64)
        for part in ("", "_null", "_stderr")
    )
    ok = torch.tensor([validity == "ok" for validity in table["validity"]])
    excess = ((value - null) / (1 - null)).where(ok, -torch.inf).nan_to_num(nan=-torch.inf)
    beyond = (excess >= _LEAST_EXCESS) & (value - null > _DEVIATIONS * stderr)
    order = excess.argsort(descending=True, stable=True).tolist()
    return [every[place] for place in order], [every[place] for place in order if beyond[place]]


def _random(
    size: int, plain: Sequence[Head], every: Sequence[Head], chosen: set[Head]
) -> tuple[_Group, ...]:
    """Distinct groups of so many heads: of those without a pattern, or of those not chosen where
    these are too few for as many groups as are asked for first.

    The draw depends on the heads alone, so that it is the same at every step as far as they are.
    """
    others = [head for head in every if head not in chosen]
    pool = plain if len(plain) >= size + (_FIRST_RANDOM - 1 if size == 1 else 1) else others
    if len(pool) < size:
        return ()
    # A fixed order of all heads: those of a pool keep theirs when it changes.
    order = np.random.default_rng([size, len(every)]).permutation(len(every))
    ordered = [every[place] for place in order if every[place] in set(pool)]
    if size == 1:
        drawn: list[tuple[Head, ...]] = [(head,) for head in ordered]
    else:
        chance = np.random.default_rng([size, len(every), 1])
        picks = (chance.choice(len(ordered), size, replace=False) for _ in range(20 * _MOST_RANDOM))
        drawn = [tuple(sorted(ordered[place] for place in pick)) for pick in picks]
    return tuple(_Group(name="random", heads=h) for h in list(dict.fromkeys(drawn))[:_MOST_RANDOM])


def _each(groups: Sequence[_Group], *methods: str) -> tuple[Ablation, ...]:
    return tuple(group.by(method) for group in groups for method in methods)


# By field, each sequence's total and count.
_Effects = dict[str, tuple[Float[Tensor, " batch"], Tensor]]


def _effects(evidence: Evidence, ablated: Mapping[str, Tensor]) -> _Effects:
    """What each sequence adds to each effect."""
    seen = evidence.observations
    later = seen["repeated"].stimulus.later_copy[:, :-1]
    change = ablated["repeated"] - _losses(seen["repeated"])
    effects: _Effects = {"repeat_later": ((change * later).sum(1), later.sum(1))}
    if "text" in seen:
        text, tail = _losses(seen["text"]), _losses(seen["text_tail"])
        one = torch.ones(len(text))
        effects["score"] = (late_minus_early(ablated["text"]) - late_minus_early(text), one)
        paired = whole_minus_tail(ablated["text"], ablated["text_tail"])
        effects["paired_score"] = (paired - whole_minus_tail(text, tail), one)
    return effects


def _losses(observation: Observation) -> Float[Tensor, "batch prediction"]:
    if observation.losses is None:
        raise ValueError("ablation needs the losses on its stimuli to be observed")
    return observation.losses


def _row(
    group: _Group,
    method: str,
    batch: int,
    effects: Mapping[Ablation, _Effects],
    random: Sequence[Ablation],
) -> dict[str, Any]:
    layer, head = group.heads[0] if group.name == "head" else (-1, -1)
    row: dict[str, Any] = {
        "group": group.name,
        "layer": layer,
        "head": head,
        "method": method,
        "heads": " ".join(f"{layer}.{head}" for layer, head in group.heads),
        "n": batch,
        "validity": "ok" if group.shown else f"no head shows the pattern of {group.name}",
    }
    own = effects[group.by(method)]
    means = {a: {f: float(pooled_mean(*effects[a][f])[0]) for f in own} for a in random}
    for field, (total, count) in own.items():
        mean, stderr = pooled_mean(total, count)
        row |= {field: float(mean), f"{field}_stderr": float(stderr)}
        of_random = [means[a][field] for a in random]
        if of_random:
            row[f"{field}_null"] = float(np.mean(of_random))
        if len(of_random) > 1:
            row[f"{field}_null_sd"] = float(np.std(of_random, ddof=1))
    if random:
        worst = max(random, key=lambda a: means[a]["repeat_later"])
        total, count = own["repeat_later"]
        mean, stderr = pooled_mean(total - effects[worst]["repeat_later"][0], count)
        row |= {"over_random": float(mean), "over_random_stderr": float(stderr)}
        row["over_random_null"] = 0.0
    return row
