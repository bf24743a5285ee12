"""What every head does, said in a word, with the evidence beside it.

A head shows a behaviour where its attention score, as the normalised excess
(score − null) / (1 − null), is at least 0.1 and beyond three standard deviations; its label is the
behaviour with the largest excess. The rules are `BEHAVIOURS`, the levels of a claim those of
`monitor.claims`; a level is claimed only with those below it.

What fools it: a label says what a head mostly does on repeated random tokens, and a head can do
several things. `causal` is said of heads in a group that was ablated together: it takes attribution
too, which a head without effect of its own that was ablated with others does not pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from monitor.claims import BEYOND, Estimate, columns_of, rows
from monitor.evidence import Evidence
from monitor.record import HEAD, LAYER, Field, ProbeSpec

_UNIFORM = "uniform attention over the keys in view, on the same tokens"
_PATTERN = "Attention is a pattern, not yet a mechanism."


def _score(name: str, help_text: str) -> Field:
    return Field(name=name, help=help_text, low=0, high=1, null=_UNIFORM, fooled_by=_PATTERN)


SPEC = ProbeSpec(
    name="heads",
    help="What every attention head does, how much of that is shown, and the evidence for it.",
    source="Olsson et al. 2022, In-context Learning and Induction Heads; McDougall et al. 2023, "
    "Copy Suppression",
    dims=(LAYER, HEAD),
    fields=(
        Field(
            name="label",
            help="previous-token, induction, duplicate-token, sink, positional, copy-suppressing "
            "or none: the behaviour with the largest excess.",
            fooled_by="A head can do several things: the evidence beside it has them all.",
            stderr=False,
            text=True,
        ),
        Field(
            name="claim",
            help="How much of the label is shown: none, pattern, attribution or causal, each with "
            "those below it.",
            fooled_by="Of many heads some pass by chance; causal is said of a group of heads.",
            stderr=False,
            text=True,
        ),
        Field(
            name="attribution_test",
            help="Whether it writes what its label says: passed, failed, not made or no rule.",
            fooled_by="Matrices that fit are no cause, and what is written need not be read.",
            stderr=False,
            text=True,
        ),
        Field(
            name="causal_test",
            help="Whether ablating its group, to zero and to the mean, raises the loss on later "
            "copies more than any random group: passed, failed or not made.",
            fooled_by="A group passes as a whole, with heads in it that have no part in it.",
            stderr=False,
            text=True,
        ),
        Field(
            name="ablated_with",
            help="The heads of the group whose ablation is the causal test.",
            fooled_by="The group was chosen by its pattern, on the same stimulus.",
            stderr=False,
            text=True,
        ),
        Field(
            name="excess",
            help="The label's attention score above its null, over the most it could be above it; "
            "for the label none the largest of all.",
            high=1,
            null="0: " + _UNIFORM,
            fooled_by="The largest of several is above 0 by chance: 0.1 and 3 deviations count.",
        ),
        _score("prefix_matching", "Attention to what followed earlier copies; see `induction`."),
        _score("previous_token", "Attention to the position before; see `induction`."),
        _score("duplicate_token", "Attention to earlier copies; see `induction`."),
        _score("first_token", "Attention to position 0; see `induction`."),
        _score(
            "same_offset", "Attention at the same offsets whatever the tokens; see `induction`."
        ),
        Field(
            name="eigenvalue_score",
            help="Whether its OV circuit copies tokens; see `copying`.",
            low=-1,
            high=1,
            null="the mean over random matrices of the same shape",
            fooled_by="Copying alone is not induction.",
            stderr=False,
            null_sd=True,
        ),
        Field(
            name="contrast",
            help="What it adds to the correct next token's logit on later copies, beyond what it "
            "adds to a shuffled target's; see `attribution`.",
            unit="logits",
            null="0: no more than to a shuffled target",
            fooled_by="It sees the direct path alone.",
        ),
        Field(
            name="key_composition",
            help="The strongest K-composition with a head labelled induction; see `composition`.",
            low=0,
            high=1,
            null="the mean over random matrices of the same shape",
            fooled_by="The strongest of several edges is above 0 by chance, and no cause.",
            stderr=False,
            null_sd=True,
        ),
        Field(
            name="over_random",
            help="How much more ablating its group raises the loss on later copies than the worst "
            "random group of its size, under zero or mean ablation, whichever says less.",
            unit="nats",
            null="0: no more than a random group",
            fooled_by="Few random groups have a low worst one.",
        ),
    ),
    needs=(),
    reads=("induction", "copying", "composition", "attribution", "ablation"),
)

# How much of what it could be above its null a score must be: less is no behaviour.
_LEAST_EXCESS = 0.1
_SCORES = ("prefix_matching", "previous_token", "duplicate_token", "first_token", "same_offset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What makes a head's label: it attends as one of the `scores` says.

    For attribution all of `writes` must lie beyond their nulls, `below` them if so; where the
    behaviour is `named_by_writing`, it takes that to be called so, and then goes before all others.
    `group` is the one of `ablation` that tests it. `unless` is a score of a special case: where
    that is most of the attention, the head is not called by the general one.
    """

    label: str
    scores: tuple[str, ...]
    writes: tuple[str, ...] = ()
    below: bool = False
    named_by_writing: bool = False
    group: str | None = None
    unless: str | None = None


BEHAVIOURS = (
    Behaviour(
        label="induction",
        scores=("prefix_matching",),
        writes=("eigenvalue_score", "contrast"),
        group="induction",
    ),
    Behaviour(
        label="previous-token",
        scores=("previous_token",),
        writes=("key_composition",),
        group="previous_token",
    ),
    Behaviour(label="duplicate-token", scores=("duplicate_token",)),
    Behaviour(label="sink", scores=("first_token",)),
    Behaviour(label="positional", scores=("same_offset",), unless="previous_token"),
    Behaviour(
        label="copy-suppressing",
        scores=("prefix_matching", "duplicate_token"),
        writes=("eigenvalue_score", "contrast"),
        below=True,
        named_by_writing=True,
    ),
)
_NONE = Behaviour(label="none", scores=_SCORES)

# The ablations that a group must pass.
_METHODS = ("zero", "mean")
_WORDS = ("label", "claim", "attribution_test", "causal_test")

Head = tuple[int, int]
Row = Mapping[str, Any]
Seen = dict[str, Estimate | None]


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a head of `induction`, from what the other tables say of it."""
    tables = {name: rows(evidence.tables.get(name)) for name in SPEC.reads}
    seen: dict[Head, Seen] = {
        _head(row): {score: Estimate.of(row, score) for score in _SCORES}
        for row in tables["induction"]
    }
    for row in tables["copying"]:
        seen.setdefault(_head(row), {})["eigenvalue_score"] = Estimate.of(row, "eigenvalue_score")
    for row in tables["attribution"]:
        if row["component"] == "head":
            seen.setdefault(_head(row), {})["contrast"] = Estimate.of(row, "contrast")
    behaviours = {head: _behaviour(numbers) for head, numbers in seen.items()}
    inducing = {head for head, behaviour in behaviours.items() if behaviour.label == "induction"}
    for row in tables["composition"]:
        if row["kind"] == "k" and _head(row, "target_") in inducing:
            numbers = seen.setdefault(_head(row, "source_"), {})
            edges = (numbers.get("key_composition"), Estimate.of(row, "ratio"))
            numbers["key_composition"] = _strongest(edges, BEYOND["key_composition"])
    ablations = [row for row in tables["ablation"] if row["validity"] == "ok"]
    told = []
    for row in tables["induction"]:
        behaviour, numbers = behaviours[_head(row)], seen[_head(row)]
        group, numbers["over_random"] = _ablated(_head(row), behaviour, ablations)
        numbers["excess"] = _excess(behaviour, numbers)
        words = _words(behaviour, numbers) if row["validity"] == "ok" else dict.fromkeys(_WORDS)
        estimates = {
            column: value
            for field in SPEC.fields
            if field.is_number
            for column, value in columns_of(field, numbers.get(field.name)).items()
        }
        copied = {name: row[name] for name in ("layer", "head", "n", "validity")}
        told.append({**copied, **words, "ablated_with": group, **estimates})
    return {column: [row[column] for row in told] for column in told[0]}


def _head(row: Row, of: str = "") -> Head:
    return row[f"{of}layer"], row[f"{of}head"]


def _strongest(estimates: Iterable[Estimate | None], deviations: float) -> Estimate | None:
    """The one that is the farthest beyond its null, or None where none was measured."""
    measured = [estimate for estimate in estimates if estimate is not None]
    return max(measured, key=lambda estimate: estimate.margin(deviations), default=None)


def _excess(behaviour: Behaviour, seen: Seen) -> Estimate | None:
    """The largest normalised excess of its scores; None where none of them was measured."""
    excesses = []
    for score in map(seen.get, behaviour.scores):
        if score is not None and score.stderr is not None and score.null < 1:
            room = 1 - score.null
            value, stderr = (score.value - score.null) / room, score.stderr / room
            excesses.append(Estimate(value=value, null=0.0, stderr=stderr, n=score.n))
    return max(excesses, key=lambda excess: excess.value, default=None)


def _behaviour(seen: Seen) -> Behaviour:
    def rank(behaviour: Behaviour) -> tuple[bool, float]:
        excess = _excess(behaviour, seen)
        return behaviour.named_by_writing, 0.0 if excess is None else excess.value

    return max((one for one in BEHAVIOURS if _shown(one, seen)), key=rank, default=_NONE)


def _shown(behaviour: Behaviour, seen: Seen) -> bool:
    excess = _excess(behaviour, seen)
    if excess is None or excess.value < _LEAST_EXCESS or not excess.beyond(BEYOND["excess"]):
        return False
    if behaviour.named_by_writing and _attribution_test(behaviour, seen) != "passed":
        return False
    special = None if behaviour.unless is None else seen[behaviour.unless]
    return special is None or special.value <= 0.5


def _words(behaviour: Behaviour, seen: Seen) -> dict[str, str]:
    attribution, causal = _attribution_test(behaviour, seen), _causal_test(seen)
    claim = "none" if behaviour is _NONE else "pattern"
    if attribution == "passed":
        claim = "causal" if causal == "passed" else "attribution"
    return {
        "label": behaviour.label,
        "claim": claim,
        "attribution_test": attribution,
        "causal_test": causal,
    }


def _attribution_test(behaviour: Behaviour, seen: Seen) -> str:
    if not behaviour.writes:
        return "no rule"
    tested = []
    for name in behaviour.writes:
        number = seen.get(name)
        if number is None:
            return "not made"
        tested.append(number.beyond(BEYOND[name], below=behaviour.below))
    return "passed" if all(tested) else "failed"


def _causal_test(seen: Seen) -> str:
    over_random = seen["over_random"]
    if over_random is None:
        return "not made"
    return "passed" if over_random.beyond(BEYOND["over_random"]) else "failed"


def _ablated(
    head: Head, behaviour: Behaviour, ablations: Iterable[Row]
) -> tuple[str | None, Estimate | None]:
    """The heads of the behaviour's group, where this one is among them, and what both of its
    ablations say: the one that says less.
    """
    heads: str | None = None
    effects: dict[str, Estimate | None] = dict.fromkeys(_METHODS)
    for row in ablations:
        mine = row["group"] == behaviour.group and f"{head[0]}.{head[1]}" in row["heads"].split()
        if mine and row["method"] in effects:
            heads, effects[row["method"]] = row["heads"], Estimate.of(row, "over_random")
    made = [effect for effect in effects.values() if effect is not None]
    if len(made) < len(_METHODS):
        return None, None
    return heads, min(made, key=lambda effect: effect.margin(BEYOND["over_random"]))
