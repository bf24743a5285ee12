"""What can be read linearly after the nonlinearity of an MLP, and what could be before it.

Candidates are the concepts that tokens are labelled with, and whether tokens have one of two of
them but not both (XOR). That is no linear function of the two: it is on half of the tokens that
have the one, whether or not they have the other, since all four cases are made equally frequent.
The AND of two concepts would be no test: where both can be read, it can be.

Of at most 256 of a layer's neurons, drawn once at random, pre-activations and post-activations are
read by the same linear discriminant, from sums over the sequences that are for fitting: the
differences of two means, against the covariance of all tokens, with every neuron scaled to a
variance of 1. How well that does is counted in the other sequences. In a gated MLP half as many
neurons are looked at, and what is read before is both the gates and what they gate: all that the
post-activations are made of.

Shapes: `candidate` what is read; `task` the candidates, and after them each with its labels
shuffled; `token` those that pass together; `dim` the numbers that are read; `stage` before and
after; `group` of sequences that are left out together.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from monitor.features.collecting import NO_CONCEPTS, Chunk
from monitor.features.scores import GROUPS, Counts, Scores, auc
from monitor.features.tasks import shuffled_labels
from monitor.labels import EVALUATION, FEWEST, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import Block, Parts, Site
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError

BEFORE, AFTER = range(2)
LABELLED, SHUFFLED = range(2)

# A covariance of more would cost as much as the layer itself.
_NEURONS = 256
# Counting takes 64 KiB a candidate and stage.
_MOST_CONCEPTS, _MOST_PAIRS = 16, 10
# In units of a neuron's variance: few tokens do not pin small directions down.
_RIDGE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readable:
    """Areas under the ROC curve for each candidate, with its own labels and with shuffled ones,
    `without` each group of sequences too.

    `used` is the participation ratio (Σw²)²/Σw⁴ of the weights on the post-activations, in units of
    their standard deviation; `neurons` how many of a layer were looked at. `reasons` say of the
    layers that are not among `layers` why.
    """

    layers: tuple[int, ...]
    candidates: tuple[str, ...]
    neurons: tuple[int, ...]
    areas: Float[Tensor, "layer 2 candidate stage"]
    without: Float[Tensor, "layer 2 candidate stage group"]
    used: Float[Tensor, "layer 2 candidate"]
    reasons: Mapping[int, str]


class ReadableCollector:
    """Collects what is linearly readable before and after the nonlinearity of each MLP.

    Raises `UnseenError` where there are no candidates, or no MLP was found.
    """

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        chosen = candidates(stimulus)
        self._names = chosen.names
        shuffled = shuffled_labels(dataclasses.replace(stimulus, labels=chosen))
        self._tasks = torch.cat([chosen.values, shuffled]).to(parts.model.device)
        evaluated = chosen.split == EVALUATION
        self._group = chosen.place % GROUPS
        self._groups = min(GROUPS, int(chosen.sources(evaluated)))
        self._reasons: dict[int, str] = {}
        self._layers: dict[int, _Layer] = {}
        for block in parts.blocks:
            try:
                self._layers[block.layer] = _Layer(block)
            except UnseenError as error:
                self._reasons[block.layer] = str(error)
        if not self._layers:
            raise UnseenError("; ".join(sorted(set(self._reasons.values()))))
        gated = any(layer.gated for layer in self._layers.values())
        inputs: tuple[Site, ...] = ("mlp_input",) if gated else ()
        self.sites: Collection[Site] = (*inputs, "mlp_pre", "mlp_post")
        self._of: tuple[Chunk, _Labelled] | None = None

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Adds up what is fitted on, and counts what is scored."""
        if layer not in self._layers:
            return
        if self._of is None or self._of[0] is not chunk:
            labels, group = chunk.of(self._tasks), self._group[chunk.row].to(rows.device)
            self._of = chunk, _Labelled.of(labels, group, fitting=chunk.split != EVALUATION)
        self._layers[layer].see(site, rows, self._of[1])

    def turn(self, split: int) -> None:
        """Fits, once all that is for fitting was seen."""
        if split == SECOND_HALF:
            for number, layer in list(self._layers.items()):
                try:
                    layer.fit()
                except UnseenError as error:
                    del self._layers[number]
                    self._reasons[number] = str(error)

    def collected(self) -> Readable:
        """What was counted."""
        if not self._layers:
            raise UnseenError("; ".join(sorted(set(self._reasons.values()))))
        counted = [layer.counted() for layer in self._layers.values()]
        left = [_leaving_out(counts, self._groups) for counts in counted]
        return Readable(
            layers=tuple(self._layers),
            candidates=self._names,
            neurons=tuple(len(layer.chosen) for layer in self._layers.values()),
            areas=torch.stack([_tasked(whole) for whole, _ in left]),
            without=torch.stack([_tasked(without) for _, without in left]),
            used=torch.stack(
                [layer.used().unflatten(0, (2, -1)) for layer in self._layers.values()]
            ),
            reasons=dict(self._reasons),
        )


def candidates(stimulus: Stimulus) -> Labels:
    """What could be read: the concepts that enough tokens have and lack, at most 16, and of at most
    10 pairs the XOR, with all four cases as frequent within each split. Those with the most tokens.

    Raises `UnseenError` where there are none.
    """
    labels = stimulus.labels
    if labels is None or not labels.names:
        raise UnseenError(NO_CONCEPTS)
    values = labels.values * labels.used
    splits = [values[:, labels.split == each] for each in (FIRST_HALF, SECOND_HALF, EVALUATION)]
    cells = torch.stack([_cells(split.flatten(1)) for split in splits])
    # A token has or lacks a concept as it does that concept twice.
    sides = cells.diagonal(dim1=-2, dim2=-1)[:, [0, 1], [0, 1]].amin((0, 1))
    enough = [c for c in sides.argsort(descending=True, stable=True).tolist() if sides[c] >= FEWEST]
    concepts = sorted(enough[:_MOST_CONCEPTS])
    worth = cells.amin((0, 1, 2))
    pairs = [
        pair
        for pair in itertools.combinations(range(len(labels.names)), 2)
        if worth[pair] >= FEWEST
    ]
    pairs = sorted(pairs, key=lambda pair: -float(worth[pair]))[:_MOST_PAIRS]
    if not concepts and not pairs:
        raise UnseenError(
            f"no concept has and lacks {FEWEST} tokens in each split: give more labelled text"
        )
    random = np.random.default_rng(0)
    xors = [_balanced_xor(values[one], values[two], labels.split, random) for one, two in pairs]
    names = [labels.names[c] for c in concepts]
    names += [f"{labels.names[one]} xor {labels.names[two]}" for one, two in pairs]
    chosen = torch.stack([*values[concepts], *xors])
    return dataclasses.replace(labels, names=tuple(names), values=chosen)


def _cells(values: Int8[Tensor, "concept token"]) -> Float[Tensor, "2 2 concept concept"]:
    """How many tokens have, or lack, the one and have, or lack, the other."""
    sides = torch.stack([values > 0, values < 0]).float()
    return torch.einsum("ict, jdt -> ijcd", sides, sides)


def _balanced_xor(
    one: Int8[Tensor, "batch position"],
    other: Int8[Tensor, "batch position"],
    split: Int[Tensor, " batch"],
    random: np.random.Generator,
) -> Int8[Tensor, "batch position"]:
    """1 where just one of the two is, -1 where both or neither are, of as many tokens of each case
    as the rarest has.
    """
    xor = torch.zeros_like(one)
    for each in (FIRST_HALF, SECOND_HALF, EVALUATION):
        inside = (split == each)[:, None]
        cases = [
            ((one == has) & (other == had) & inside).nonzero() for has in (1, -1) for had in (1, -1)
        ]
        fewest = min(len(case) for case in cases)
        for case, side in zip(cases, (-1, 1, 1, -1), strict=True):
            kept = torch.from_numpy(random.permutation(len(case))[:fewest])
            xor[tuple(case[kept].T)] = side
    return xor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Labelled:
    """What is known of the tokens of a chunk: `sides` says 1 where a token has, or lacks, it."""

    labels: Int8[Tensor, "task token"]
    group: Int[Tensor, " token"]
    sides: Float[Tensor, "2 task token"] | None

    @classmethod
    def of(cls, labels: Tensor, group: Tensor, *, fitting: bool) -> _Labelled:
        sides = torch.stack([labels > 0, labels < 0]).float() if fitting else None
        return cls(labels=labels, group=group, sides=sides)


class _Layer:
    """The two readers of an MLP. Raises `UnseenError` where it cannot be seen."""

    def __init__(self, block: Block) -> None:
        pre, neurons = block.taps.get("mlp_pre"), block.neurons
        if neurons is None or pre is None or neurons.pre_columns is None:
            reasons = [
                block.reasons[name] for name in ("neurons", "mlp_pre") if name in block.reasons
            ]
            raise UnseenError(f"MLP: {'; '.join(reasons) or 'not found'}")
        self.gated, self._up, self._bias = neurons.gate is not None, None, None
        count = len(neurons.pre_columns)
        drawn = np.random.default_rng(block.layer).permutation(count)
        most = _NEURONS // 2 if self.gated else _NEURONS
        self.chosen = torch.from_numpy(np.sort(drawn[:most]))
        if self.gated:
            up, bias = block.w_in, block.b_in
            if up is None or bias is None or "mlp_input" not in block.taps:
                raise UnseenError("MLP: what its gates gate was not found")
            self._up, self._bias = up[:, self.chosen].float(), bias[self.chosen].float()
        self._readers = (_Reader(), _Reader())
        self._gated: Tensor | None = None

    def see(self, site: Site, rows: Tensor, labelled: _Labelled) -> None:
        if site == "mlp_input":
            if self._up is not None and self._bias is not None:
                self._gated = rows.float() @ self._up + self._bias
            return
        dims = rows[:, self.chosen.to(rows.device)].float()
        if site == "mlp_pre" and self.gated:
            if self._gated is None:
                raise UnseenError("MLP: what its gates gate did not pass")
            dims, self._gated = torch.cat([dims, self._gated], dim=1), None
        self._readers[AFTER if site == "mlp_post" else BEFORE].see(dims, labelled)

    def fit(self) -> None:
        for reader in self._readers:
            reader.fit()

    def counted(self) -> Int[Tensor, "stage task group side bin"]:
        return torch.stack([reader.counted() for reader in self._readers])

    def used(self) -> Float[Tensor, " task"]:
        return self._readers[AFTER].used()


class _Reader:
    """A linear discriminant for every task, from sums; then it counts the scores that it gives."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shift: Tensor | None = None
        self._weights: Tensor | None = None
        self._standard: Tensor | None = None
        self._scores: Scores | None = None

    def see(self, dims: Float[Tensor, "token dim"], labelled: _Labelled) -> None:
        if self._shift is None:
            # What is large beside the variance would cost its digits.
            self._shift = dims.mean(0)
        dims = dims - self._shift
        if labelled.sides is not None:
            self._add("tokens", dims.new_tensor(float(len(dims))))
            self._add("total", dims.sum(0))
            self._add("products", dims.T @ dims)
            self._add("sides", labelled.sides @ dims)
            self._add("counts", labelled.sides.sum(-1))
        elif self._weights is not None and self._scores is not None:
            scores = self._weights @ dims.T
            self._add("seen", scores.sum())
            self._scores.add(scores, labelled.labels, labelled.group)

    def _add(self, name: str, more: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += more
        else:
            self._sums[name] = more

    def fit(self) -> None:
        if self._shift is None:
            raise UnseenError("MLP: its activations did not pass")
        device = self._shift.device
        sums = {name: value.cpu().double() for name, value in self._sums.items()}
        mean = sums["total"] / sums["tokens"]
        covariance = sums["products"] / sums["tokens"] - mean.outer(mean)
        if not covariance.isfinite().all():
            raise UnseenError("MLP: its activations are not finite")
        scale = _inverse_sd(covariance.diagonal(), mean + self._shift.cpu().double())
        having, lacking = sums["sides"] / sums["counts"].unsqueeze(-1)
        correlation = scale[:, None] * covariance * scale
        ridge = _RIDGE * torch.eye(len(scale), dtype=torch.float64)
        standard = torch.linalg.solve(correlation + ridge, ((having - lacking) * scale).T).T
        weights = standard * scale
        threshold = (weights * (having + lacking)).sum(-1) / 2
        spread = torch.einsum("td, de, te -> t", weights, covariance, weights).clamp_min(0).sqrt()
        self._standard, self._weights = standard, weights.float().to(device)
        self._scores = Scores(threshold.float().to(device), spread.float().to(device))
        self._sums = {}

    def counted(self) -> Int[Tensor, "task group side bin"]:
        seen = self._sums.get("seen")
        if self._scores is None or seen is None:
            raise UnseenError("no sequence is for evaluation")
        if not seen.isfinite():
            raise UnseenError("MLP: its activations are not finite")
        return self._scores.counts

    def used(self) -> Float[Tensor, " task"]:
        if self._standard is None:
            raise AssertionError("it was fitted")
        squares = self._standard.square()
        used: Tensor = squares.sum(-1).square() / squares.square().sum(-1)
        return used.nan_to_num(0.0).float()


def _inverse_sd(
    variance: Float[Tensor, " dim"], mean: Float[Tensor, " dim"]
) -> Float[Tensor, " dim"]:
    """0 for what does not vary but for rounding."""
    varies: Bool[Tensor, " dim"] = variance > 1e-12 * (variance + mean.square())
    return variance.where(varies, 1.0).rsqrt() * varies


def _leaving_out(
    counts: Int[Tensor, "stage task group side bin"], groups: int
) -> tuple[Float[Tensor, "stage task"], Float[Tensor, "stage task left"]]:
    """Areas from all groups of sequences, and as each is left out."""
    whole: Counts = counts.sum(2, keepdim=True, dtype=counts.dtype)
    left = (whole - counts)[:, :, :groups]
    return auc(whole)[0], auc(left.unsqueeze(-3))[0]


def _tasked(areas: Float[Tensor, "stage task *left"]) -> Float[Tensor, "2 candidate stage *left"]:
    """Candidates and, after them, the shuffled ones."""
    tasked: Tensor = areas.movedim(0, 1).unflatten(0, (2, -1))
    return tasked
