"""How well a few neurons tell concepts apart: sparse probing.

Neurons are chosen on the first half of the sequences to fit on, by the difference of the classes'
means in standard deviations within them; a linear discriminant on the best 1, 2, 4 … of them is
fitted on the second half; and what it says is counted on the sequences for evaluation. So none of
the three has seen the tokens of another. What is kept of a layer are sums: of every neuron while
they are chosen, then one covariance of the chosen ones for each concept and curve.

Shapes: `concept` what tokens are labelled with; `task` the concept and its control task; `curve`
one of `CURVES`; `size` how many neurons are used; `group` sequences that are left out together;
`side` 0 where a token has the concept, 1 where it has not; `answer` 0 where the classifier says
that it has, 1 where not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.features.collecting import NO_CONCEPTS, Chunk
from monitor.features.nested import discriminants, within_at_least
from monitor.features.scores import GROUPS
from monitor.features.tasks import control_labels, tokens_counted
from monitor.labels import EVALUATION, FEWEST, FIRST_HALF, SECOND_HALF
from monitor.parts import Parts, Site
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError

CURVES = ("best", "control", "random")
# Which labels a curve is about: the concept's, its control task's, and the concept's again.
_TASK = (0, 1, 0)

_SITES: tuple[Site, ...] = ("mlp_post",)

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# A classifier has at least so many tokens a neuron.
_TOKENS_A_NEURON = 4

# The covariances of all layers take at most this: 256 neurons of 12 layers and 14 concepts.
_BYTES = 128 * 2**20

# So many different sets of random neurons stand for all of them, as far as there are as many.
_DRAWS = 8

# So many tokens of all neurons are held in float32 at a time.
_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sparse:
    """What the classifiers on so many (`SIZES`) neurons said of tokens that none of them had seen,
    by layer and concept, in the layers that are not in `reasons`.

    `largest` is the number of neurons up to which there are classifiers, 0 where there are too few
    tokens; `controlled` says whether the control task has enough of them; `lost` counts
    activations and weights that were not finite. `tokens` count by task and split.
    """

    names: tuple[str, ...]
    layers: int
    answers: Int[Tensor, "layer concept curve size group side answer"]
    lost: Int[Tensor, "layer concept curve size"]
    largest: Int[Tensor, "layer concept"]
    controlled: Bool[Tensor, " concept"]
    tokens: Int[Tensor, "task concept split side"]
    sources: Int[Tensor, " concept"]
    reasons: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counted:
    """The tokens of a chunk that count for one concept: where they are in it, the side that each of
    them is on by task, and their group.
    """

    place: Int[Tensor, " token"]
    side: Int[Tensor, "task token"]
    group: Int[Tensor, " token"]


class SparseCollector:
    """Adds up, split by split, what `Sparse` tells of the neurons of all blocks."""

    sites: Collection[Site] = _SITES

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        labels = stimulus.labels
        if labels is None or not labels.names:
            raise UnseenError(NO_CONCEPTS)
        self._parts, self._names = parts, labels.names
        control = control_labels(stimulus)
        self._labels = torch.cat([labels.values, control]) * labels.used
        self._tokens = tokens_counted(self._labels.unflatten(0, (2, -1)), labels.split)
        fewest = self._tokens.amin((2, 3)) >= FEWEST
        self._enough, self._controlled = fewest[0], fewest.all(0)
        most = self._tokens[0, :, SECOND_HALF].sum(-1) // _TOKENS_A_NEURON
        self._allowed = torch.where(self._enough, most, 0)
        held = len(parts.blocks) * len(labels.names) * len(CURVES) * 4
        self._most = max(size for size in SIZES if size == 1 or held * size**2 <= _BYTES)
        evaluated = labels.split == EVALUATION
        self._group = labels.place % GROUPS
        counts = (self._labels[: len(self._names)] != 0).any(-1) & evaluated
        self._sources = labels.sources(counts)
        self._ranked: dict[int, _Ranking] = {}
        self._fitted: dict[int, _Covariances] = {}
        self._asked: dict[int, _Answers] = {}
        self._prepared: tuple[Chunk | None, Tensor, Tensor, list[_Counted]] | None = None

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Takes the neurons of some tokens."""
        del site
        some, signs, counted = self._of(chunk, rows.device)
        if chunk.split == FIRST_HALF:
            if layer not in self._ranked:
                self._ranked[layer] = _Ranking(rows, tasks=len(signs))
            self._ranked[layer].add(rows, some, signs)
        elif chunk.split == SECOND_HALF and layer in self._fitted:
            self._fitted[layer].add(rows, counted)
        elif chunk.split == EVALUATION and layer in self._asked:
            self._asked[layer].add(rows, counted)

    def turn(self, split: int) -> None:
        """Chooses neurons after the first half, and fits classifiers after the second."""
        if split == FIRST_HALF:
            for layer in list(self._ranked):
                ranking = self._ranked.pop(layer)
                most = min(self._most, ranking.neurons, max(1, int(self._allowed.max())))
                most = max(size for size in SIZES if size <= most)
                tokens = self._tokens[:, :, FIRST_HALF]
                self._fitted[layer] = ranking.chosen(tokens, most, seed=layer)
        elif split == SECOND_HALF:
            for layer in list(self._fitted):
                tokens = self._tokens[:, :, SECOND_HALF]
                self._asked[layer] = self._fitted.pop(layer).classifiers(tokens)

    def collected(self) -> Sparse:
        """What the classifiers said."""
        layers, concepts = len(self._parts.blocks), len(self._names)
        shape = (layers, concepts, len(CURVES), len(SIZES))
        answers = torch.zeros(*shape, GROUPS, 2, 2, dtype=torch.int64)
        lost = torch.zeros(shape, dtype=torch.int64)
        largest = torch.zeros(layers, concepts, dtype=torch.int64)
        for layer, asked in self._asked.items():
            counted = asked.answers.cpu().unflatten(3, (GROUPS, 2)).long()
            answers[layer, :, :, : counted.shape[2]] = counted
            lost[layer, :, :, : counted.shape[2]] = asked.lost.cpu().long()
            within = torch.tensor(SIZES) <= self._allowed.clamp(max=asked.most)[:, None]
            largest[layer] = torch.where(within, torch.tensor(SIZES), 0).amax(1)
        unseen = {
            block.layer: f"no neurons: {block.reasons.get('neurons', 'none were seen')}"
            for block in self._parts.blocks
            if block.layer not in self._asked
        }
        return Sparse(
            names=self._names,
            layers=layers,
            answers=answers,
            lost=lost,
            largest=largest,
            controlled=self._controlled,
            tokens=self._tokens,
            sources=self._sources,
            reasons=unseen,
        )

    def _of(self, chunk: Chunk, device: torch.device) -> tuple[Tensor, Tensor, list[_Counted]]:
        """Which tokens of a chunk count for any concept, their labels, and those of each concept;
        worked out once for all layers.
        """
        if self._prepared is None or self._prepared[0] is not chunk:
            labels = chunk.of(self._labels)
            some = (labels != 0).any(0).nonzero().flatten()
            group = self._group[chunk.row]
            concepts = len(self._names)
            counted = []
            for concept in range(concepts):
                place = labels[concept].nonzero().flatten()
                side = (labels[concept::concepts, place] < 0).long()
                counted.append(
                    _Counted(
                        place=place.to(device),
                        side=side.to(device),
                        group=group[place].to(device),
                    )
                )
            signs = labels[:, some].float().to(device)
            self._prepared = (chunk, some.to(device), signs, counted)
        _, some, signs, counted = self._prepared
        return some, signs, counted


class _Ranking:
    """Sums of every neuron over the tokens of each class, about its mean in the first chunk: then a
    mean that is large beside the variance costs no digits.
    """

    def __init__(self, first: Float[Tensor, "token neuron"], *, tasks: int) -> None:
        self.neurons = first.shape[1]
        self._shift = first.float().mean(0)
        self._differences = first.new_zeros(tasks, self.neurons, dtype=torch.float32)
        self._sums = first.new_zeros(tasks // 2, self.neurons, dtype=torch.float32)
        self._squares = torch.zeros_like(self._sums)

    def add(
        self,
        rows: Float[Tensor, "token neuron"],
        some: Int[Tensor, " counted"],
        signs: Float[Tensor, "tasks counted"],
    ) -> None:
        for place, sign in zip(some.split(_ROWS), signs.split(_ROWS, dim=1), strict=True):
            moved = rows[place].float() - self._shift
            counts = sign[: len(self._sums)].abs()
            self._differences += sign @ moved
            self._sums += counts @ moved
            self._squares += counts @ moved.square_()

    def chosen(
        self, tokens: Int[Tensor, "task concept side"], most: int, *, seed: int
    ) -> _Covariances:
        """Where to add up covariances of the `most` best neurons of each task, and of random
        ones, about the means that were seen here.
        """
        device = self._shift.device
        number = tokens.to(device, torch.float32).clamp(min=1)[..., None]
        sums = self._sums.expand(2, -1, -1)
        differences = self._differences.unflatten(0, (2, -1))
        means = torch.stack([sums + differences, sums - differences], dim=2) / 2 / number
        within = self._squares - (means.square() * number).sum(2)
        apart = means[:, :, 0] - means[:, :, 1]
        # NaN stands before all numbers: activations that are not finite are not passed over.
        total = number.sum(2)
        scale = within_at_least(within / total, self._squares / total).sqrt()
        best = (apart.abs() / scale).argsort(dim=-1, descending=True, stable=True)[..., :most]
        drawn = np.random.default_rng([seed, 3]).permutation(self.neurons)[:most]
        random = torch.from_numpy(drawn).to(device).expand_as(best[0])
        chosen = torch.stack([best[0], best[1], random], dim=1)
        curves = means[list(_TASK)].movedim(0, 1) + self._shift
        places = chosen.unsqueeze(2).expand(-1, -1, 2, -1)
        return _Covariances(chosen, curves.gather(-1, places))


class _Covariances:
    """Sums and products of the chosen neurons over tokens, about a centre for each class that is
    near its mean.
    """

    def __init__(
        self,
        chosen: Int[Tensor, "concept curve neuron"],
        centres: Float[Tensor, "concept curve side neuron"],
    ) -> None:
        self._chosen, self._centres = chosen, centres
        self._sums = torch.zeros_like(centres)
        self._products = centres.new_zeros(*chosen.shape, chosen.shape[-1])

    def add(self, rows: Float[Tensor, "token neuron"], counted: list[_Counted]) -> None:
        for concept, its in enumerate(counted):
            side = its.side[list(_TASK)]
            seen = _of_curves(rows, its.place, self._chosen[concept])
            curve = torch.arange(len(CURVES), device=side.device)[:, None]
            seen = seen - self._centres[concept][curve, side]
            having = torch.stack([side == 0, side == 1], dim=1).to(seen.dtype)
            self._sums[concept] += having @ seen
            self._products[concept].baddbmm_(seen.mT, seen)

    def classifiers(self, tokens: Int[Tensor, "task concept side"]) -> _Answers:
        """The classifiers on the chosen neurons, ready to be asked; worked out on the CPU in
        float64.
        """
        number = tokens[list(_TASK)].movedim(0, 1).double()
        counted = number.clamp(min=1)[..., None]
        moved = self._sums.cpu().double() / counted
        means = self._centres.cpu().double() + moved
        between = torch.einsum("...si,...sj,...s->...ij", moved, moved, number)
        total = number.sum(-1).clamp(min=1)
        products = self._products.cpu().double()
        covariance = (products - between) / total[..., None, None]
        apart = means[:, :, 0] - means[:, :, 1]
        squares = products.diagonal(dim1=-2, dim2=-1) / total[..., None] + apart.square() / 4
        within = covariance.diagonal(dim1=-2, dim2=-1)
        within.copy_(within_at_least(within, squares))
        sizes = [size for size in SIZES if size <= covariance.shape[-1]]
        fitted = discriminants(covariance[:, :2], apart[:, :2], sizes=sizes, tokens=total[:, :2])
        drawn, size_of = _on_draws(covariance[:, 2], apart[:, 2], sizes, total[:, 2])
        device = self._centres.device
        weights = [*fitted.unbind(1), drawn]
        places = [torch.arange(len(sizes)), torch.arange(len(sizes)), size_of]
        return _Answers(
            self._chosen,
            means.mean(2).to(device, torch.float32),
            [each.to(device, torch.float32) for each in weights],
            [each.to(device) for each in places],
        )


class _Answers:
    """Counts what classifiers say of tokens."""

    def __init__(
        self,
        chosen: Int[Tensor, "concept curve neuron"],
        middles: Float[Tensor, "concept curve neuron"],
        weights: list[Float[Tensor, "concept classifier neuron"]],
        size_of: list[Int[Tensor, " classifier"]],
    ) -> None:
        self.most = chosen.shape[-1]
        self._chosen, self._middles, self._weights = chosen, middles, weights
        self._size_of = size_of
        concepts, curves, _ = chosen.shape
        sizes = int(size_of[0].max()) + 1
        # Whole numbers, which float32 holds up to 16 million.
        self.answers = middles.new_zeros(concepts, curves, sizes, GROUPS * 2, 2)
        self.lost = middles.new_zeros(concepts, curves, sizes)

    def add(self, rows: Float[Tensor, "token neuron"], counted: list[_Counted]) -> None:
        for concept, its in enumerate(counted):
            seen = _of_curves(rows, its.place, self._chosen[concept])
            seen = seen - self._middles[concept].unsqueeze(1)
            for curve, task in enumerate(_TASK):
                size_of = self._size_of[curve]
                scores = self._weights[curve][concept] @ seen[curve].T
                place = its.group * 2 + its.side[task]
                each = torch.nn.functional.one_hot(place, GROUPS * 2).to(scores.dtype)
                having = (scores > 0).to(scores.dtype) @ each
                lacking = each.sum(0) - having
                answers = torch.stack([having, lacking], dim=-1)
                self.answers[concept, curve].index_add_(0, size_of, answers)
                lost = (~scores.isfinite()).sum(1).to(scores.dtype)
                self.lost[concept, curve].index_add_(0, size_of, lost)


def _of_curves(
    rows: Float[Tensor, "token neuron"],
    place: Int[Tensor, " counted"],
    chosen: Int[Tensor, "curve place"],
) -> Float[Tensor, "curve counted place"]:
    # Columns first: rows of all neurons would be copied whole.
    seen: Tensor = rows.index_select(1, chosen.flatten())[place].float()
    return seen.view(-1, *chosen.shape).movedim(1, 0)


def _on_draws(
    covariance: Float[Tensor, "concept neuron neuron"],
    difference: Float[Tensor, "concept neuron"],
    sizes: list[int],
    tokens: Float[Tensor, " concept"],
) -> tuple[Float[Tensor, "concept classifier neuron"], Int[Tensor, " classifier"]]:
    """Classifiers on several sets of neurons of each size, no two of which share one, and the place
    of each one's size.
    """
    weights, size_of = [], []
    for place, size in enumerate(sizes):
        for start in range(0, min(_DRAWS, len(difference[0]) // size) * size, size):
            own = slice(start, start + size)
            fitted = discriminants(
                covariance[:, own, own], difference[:, own], sizes=[size], tokens=tokens
            )
            whole = torch.zeros_like(difference)
            whole[:, own] = fitted[:, 0]
            weights.append(whole)
            size_of.append(place)
    return torch.stack(weights, dim=1), torch.tensor(size_of)
