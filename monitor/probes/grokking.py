"""Grokking: from answers that are remembered to answers that are computed.

Of any task: loss and accuracy on the questions that are trained on and on those held out, the gap
between them, and the norm of the weights. Of addition modulo p also the progress measures of Nanda
et al. 2023. A network that computes a + b does so with waves of a few key frequencies k, in the
logits cos and sin of 2π k (a + b) / p. Of their components the restricted loss keeps those of the
key frequencies alone, and the mean; the excluded loss is that of all else, on what is trained on.
As the waves form the restricted loss falls, though the answers may still be looked up; as looking
up is given up the excluded loss rises. The Gini coefficient (0: all frequencies alike, near 1: few)
says how sparse the norms of the frequencies are: in the logits, and in the embedding and the
unembedding of the numbers. All is computed in float64.

The key frequencies are those of this measurement: with more than five times the median power of all
frequencies, and a fiftieth of the strongest one's. So at most half of them are, and as many others
at random are the null. Those that a training will end with are known in its last measurement alone:
named in the task, in a second pass over checkpoints, they have fields of their own.

What fools it: with a fixed number of key frequencies the restricted loss falls as training answers
are learned by heart, since components are means over all pairs with the same sum; here nothing
stands out then. A model that cannot tell a + b from b + a knows the held-out pairs that are
mirrored in the training pairs: hold out both.

Shapes: `question` number a p + b is a + b; `number` each that may be the answer; `sum` what a + b
is modulo p; `frequency` from 0 to p / 2, or from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from monitor.answers import Answers
from monitor.estimate import pooled_mean
from monitor.evidence import Evidence, unseen
from monitor.labels import EVALUATION
from monitor.record import Field, ProbeSpec
from monitor.tasks import Sums, answer_length, sums_in

_OTHERS = "mean over random frequencies, as many and none of them key"
_SHARED = "Questions that are held out in name alone: their mirror images are trained on, say."
_NAMED = "Frequencies that a finished training ended with are hindsight: they tell no one in time."
_NO_GAP = "0: no better on what is trained on"
_MIXED = "Waves in the order of the numbers alone: of token ids in another order it sees none."


def _asked_fields(name: str, of: str, fooled_by: str) -> tuple[Field, Field]:
    return (
        Field(
            name=f"{name}_loss",
            help=f"Mean loss of an answer's tokens on {of}.",
            unit="nats",
            low=0,
            null="log(vocabulary): the uniform guess",
            fooled_by=fooled_by,
        ),
        Field(
            name=f"{name}_accuracy",
            help=f"Share of the tokens of answers that are the most likely ones, on {of}.",
            low=0,
            high=1,
            null="1 / vocabulary: the uniform guess",
            fooled_by=fooled_by,
        ),
    )


def _gini_field(of: str, where: str, null: str) -> Field:
    return Field(
        name=f"gini_{of}",
        help=f"Gini coefficient of the norms of the frequencies in {where}.",
        low=0,
        high=1,
        null=f"mean over random orders of {null}",
        null_sd=True,
        stderr=False,
        fooled_by=_MIXED,
    )


def _wave_fields(suffix: str, which: str, fooled_by: str) -> tuple[Field, Field]:
    return (
        Field(
            name=f"restricted_loss{suffix}",
            help=f"Loss over all pairs if logits had but their mean and {which}.",
            unit="nats",
            low=0,
            null=_OTHERS,
            null_sd=True,
            fooled_by=fooled_by,
        ),
        Field(
            name=f"excluded_loss{suffix}",
            help=f"Loss on the training pairs if logits lacked {which}.",
            unit="nats",
            low=0,
            null=_OTHERS,
            null_sd=True,
            fooled_by=fooled_by,
        ),
    )


SPEC = ProbeSpec(
    name="grokking",
    help="Whether a task's answers are remembered or computed: training against held-out "
    "questions, and in modular addition the waves of the logits. n is the number of questions.",
    source="Nanda et al. 2023, Progress measures for grokking via mechanistic interpretability",
    dims=(),
    fields=(
        *_asked_fields("train", "the questions that are trained on", "It says nothing of others."),
        *_asked_fields("held_out", "the questions that are held out", _SHARED),
        *_asked_fields("full", "all questions", "With most of them trained on it hides the rest."),
        Field(
            name="loss_gap",
            help="Held-out loss minus training loss.",
            unit="nats",
            null=_NO_GAP,
            fooled_by=_SHARED,
        ),
        Field(
            name="accuracy_gap",
            help="Training accuracy minus held-out accuracy.",
            low=-1,
            high=1,
            null=_NO_GAP,
            fooled_by=_SHARED,
        ),
        Field(
            name="weight_norm",
            help="Root of the sum of squares of all weights; exact, its standard error is 0.",
            low=0,
            null="0: all that weight decay alone leaves",
            fooled_by="Scales that cancel, before a norm say, change it and nothing else.",
        ),
        *_wave_fields(
            "",
            "the waves of the key frequencies of this very measurement",
            "Which frequencies are key may change from one measurement to the next, and it jumps.",
        ),
        *_wave_fields("_named", "the waves of the frequencies named in the task", _NAMED),
        _gini_field("logits", "the logits, as waves of a + b", "the sums"),
        _gini_field("embedding", "the embedding of the numbers", "the numbers"),
        _gini_field("unembedding", "the unembedding of the numbers", "the numbers"),
        Field(
            name="key_frequencies",
            help="The key frequencies of this very measurement.",
            stderr=False,
            per="key",
        ),
        Field(
            name="spectrum",
            help="Norm of the waves in the logits of each frequency, from 1 on.",
            stderr=False,
            per="frequency",
        ),
    ),
    needs=(("task", "answers"),),
)

_SEED, _DRAWS = 0, 8
_OVER_MEDIAN, _OF_STRONGEST = 5.0, 1 / 50


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row, from the answers to `task`."""
    observation = evidence.observations.get("task")
    if observation is None:
        return unseen(SPEC, "there is no task to look at: pass task=")
    answers, stimulus = observation.answers, observation.stimulus
    if answers is None or stimulus.labels is None:
        raise ValueError("grokking needs the answers to its stimulus to be observed")
    columns: dict[str, Any] = dict.fromkeys(c for field in SPEC.fields for c in field.columns)
    train = stimulus.labels.split != EVALUATION
    columns |= _losses(answers, train, answer_length(stimulus), observation.vocab_size)
    if answers.weight_norm is not None:
        columns |= {
            "weight_norm": [answers.weight_norm],
            "weight_norm_stderr": [0.0],
            "weight_norm_null": [0.0],
        }
    sums = sums_in(stimulus)
    if sums is not None and answers.logits is not None:
        columns |= _fourier(answers, answers.logits, train, sums)
    return columns | {"n": [len(train)], "validity": ["ok"]}


def _losses(
    answers: Answers, train: Bool[Tensor, " question"], length: int, vocabulary: int
) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    everyone = torch.ones_like(train)
    for what, total, null in (
        ("loss", answers.losses, math.log(vocabulary)),
        ("accuracy", answers.right.double(), 1 / vocabulary),
    ):
        seen = {}
        for name, asked in (("train", train), ("held_out", ~train), ("full", everyone)):
            count = torch.full((int(asked.sum()),), length)
            seen[name] = pooled_mean(total[asked], count)
            columns |= _column(f"{name}_{what}", *seen[name], null)
        (mean, error), (held_out, held_out_error) = seen["train"], seen["held_out"]
        gap = held_out - mean if what == "loss" else mean - held_out
        columns |= _column(f"{what}_gap", gap, torch.hypot(error, held_out_error), 0.0)
    return columns


def _fourier(
    answers: Answers,
    logits: Float[Tensor, "question number"],
    train: Bool[Tensor, " question"],
    sums: Sums,
) -> dict[str, Any]:
    waves = Waves.of(logits, sums.total, train)
    power = waves.norms.square()
    keys = key_frequencies(power)
    columns: dict[str, Any] = {"key_frequencies": [keys], "spectrum": [waves.norms]}
    for suffix, chosen in (("", keys), *([("_named", sums.keys)] if sums.keys else ())):
        columns |= _progress(waves, chosen, suffix)
    for of, rows in (
        ("logits", waves.by_sum),
        ("embedding", answers.embedding),
        ("unembedding", answers.unembedding),
    ):
        if rows is not None:
            columns |= _gini(of, rows)
    return columns


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waves:
    """Logits of all pairs, less their mean over numbers, which changes nothing; `by_sum` their
    means over pairs of one sum, which hold all waves of a + b; `total` the sums, `train` what is
    trained on.
    """

    logits: Float[Tensor, "question number"]
    total: Int[Tensor, " question"]
    train: Bool[Tensor, " question"]
    by_sum: Float[Tensor, "sum number"]

    @classmethod
    def of(
        cls,
        logits: Float[Tensor, "question number"],
        total: Int[Tensor, " question"],
        train: Bool[Tensor, " question"],
    ) -> Waves:
        """In float64, whatever the logits are in."""
        logits = logits.double()
        logits = logits - logits.mean(1, keepdim=True)
        p = logits.shape[1]
        by_sum = logits.new_zeros(p, p).index_add(0, total, logits) / p
        return cls(logits=logits, total=total, train=train, by_sum=by_sum)

    @property
    def norms(self) -> Float[Tensor, " frequency"]:
        """The norm of the waves of each frequency from 1 on."""
        return norms(self.by_sum)

    def component(self, keys: Sequence[int]) -> Float[Tensor, "sum number"]:
        """The waves of these frequencies."""
        spectrum: Complex[Tensor, "frequency number"] = torch.fft.rfft(self.by_sum, dim=0)
        kept = torch.zeros_like(spectrum)
        kept[list(keys)] = spectrum[list(keys)]
        component: Tensor = torch.fft.irfft(kept, n=len(self.by_sum), dim=0)
        return component

    def losses(
        self, keys: Sequence[int]
    ) -> Mapping[str, tuple[Float[Tensor, " sum"], Int[Tensor, " sum"]]]:
        """The restricted and the excluded loss: of each sum the losses added up, and how many."""
        number = torch.arange(len(self.by_sum))
        wave = self.component(keys)
        restricted = F.cross_entropy(self.by_sum.mean(0) + wave, number, reduction="none")
        total = self.total[self.train]
        without = self.logits[self.train] - wave[total]
        excluded = F.cross_entropy(without, total, reduction="none")
        return {
            "restricted": (restricted, torch.ones_like(number)),
            # Pairs of one sum lack the same: these are what is independent.
            "excluded": (
                torch.zeros_like(restricted).index_add(0, total, excluded),
                torch.bincount(total, minlength=len(number)),
            ),
        }


def norms(rows: Float[Tensor, "number column"]) -> Float[Tensor, " frequency"]:
    """The norms of the waves along the rows of each frequency, from 1 to half their number.

    >>> at = torch.arange(5, dtype=torch.float64)[:, None]
    >>> [round(norm, 6) for norm in norms(torch.cos(2 * torch.pi * 2 * at / 5)).tolist()]
    [0.0, 1.581139]
    """
    p = len(rows)
    power = torch.fft.rfft(rows.double(), dim=0).abs().square().sum(1) / p
    # All others stand for themselves and for their conjugates.
    power[1 : (p + 1) // 2] *= 2
    each: Tensor = power[1:].sqrt()
    return each


def key_frequencies(power: Float[Tensor, " frequency"]) -> list[int]:
    """The frequencies, counted from 1, that stand out: at most half of them.

    >>> key_frequencies(torch.tensor([1.0, 9.0, 1.0, 1.0, 40.0], dtype=torch.float64))
    [2, 5]
    """
    least = torch.maximum(_OVER_MEDIAN * power.quantile(0.5), _OF_STRONGEST * power.max())
    keys: list[int] = (1 + (power > least).nonzero().flatten()).tolist()
    return keys


def gini(values: Float[Tensor, " value"]) -> float | None:
    """The Gini coefficient of values that are not negative: 0 where all are alike, 1 - 1/n where
    all but one of n are 0; None where all are.

    >>> gini(torch.tensor([1.0, 1.0])), gini(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    (0.0, 0.75)
    """
    ordered, n = values.sort().values, len(values)
    rank = 2 * torch.arange(1, n + 1) - n - 1
    total = float(ordered.sum())
    return None if total == 0 else float((rank * ordered).sum()) / (n * total)


def _progress(waves: Waves, keys: Sequence[int], suffix: str) -> dict[str, Any]:
    """The columns of the restricted and the excluded loss with these key frequencies."""
    others = torch.tensor([k for k in range(1, len(waves.norms) + 1) if k not in keys])
    random = torch.Generator().manual_seed(_SEED)
    draws = []
    for _ in range(_DRAWS if len(others) >= len(keys) else 0):
        drawn = others[torch.randperm(len(others), generator=random)[: len(keys)]].tolist()
        draws.append({name: pooled_mean(*each)[0] for name, each in waves.losses(drawn).items()})
    columns: dict[str, Any] = {}
    for name, of_sum in waves.losses(keys).items():
        field = f"{name}_loss{suffix}"
        columns |= _column(field, *pooled_mean(*of_sum), None)
        if draws:
            null = torch.stack([draw[name] for draw in draws])
            columns |= {f"{field}_null": [null.mean()], f"{field}_null_sd": [null.std()]}
    return columns


def _gini(of: str, rows: Float[Tensor, "number column"]) -> dict[str, Any]:
    random = torch.Generator().manual_seed(_SEED)
    orders = [torch.randperm(len(rows), generator=random) for _ in range(_DRAWS)]
    found = gini(norms(rows))
    drawn = [value for order in orders if (value := gini(norms(rows[order]))) is not None]
    if found is None or len(drawn) < _DRAWS:
        return {}
    null = torch.tensor(drawn, dtype=torch.float64)
    field = f"gini_{of}"
    return {field: [found], f"{field}_null": [null.mean()], f"{field}_null_sd": [null.std()]}


def _column(field: str, mean: Tensor, stderr: Tensor, null: float | None) -> dict[str, Any]:
    return {
        field: [float(mean)],
        f"{field}_stderr": [float(stderr)],
        f"{field}_null": [null],
    }
