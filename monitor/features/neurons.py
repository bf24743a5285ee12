"""Neurons of MLPs after the nonlinearity: what they are like, which concepts they tell, and on
which tokens they are most active.

In the sequences to fit on only sums are kept, of every neuron and of random directions. By them
some neurons of each layer are chosen; what is said of these comes from sequences that did not
choose.

Shapes: `token` those of some sequences; `neuron` those of a layer; `chosen` the top ones of them,
the best first; `set` the concepts' own labels, then permuted ones; `group` sequences that are left
out together; `side` 0 where a token has the concept, 1 where not; `bin` of a score.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monitor.estimate import jackknife_stderr
from monitor.features.collecting import Chunk
from monitor.features.contexts import Contexts
from monitor.features.permuting import permuted_labels
from monitor.features.scores import Counts, Scores
from monitor.features.units import (
    GROUPS,
    PERMUTATIONS,
    Grouped,
    Summary,
    Tokens,
    Told,
    UnitSums,
    random_directions,
)
from monitor.labels import EVALUATION, FEWEST, SECOND_HALF, Labels
from monitor.parts import Parts, Site
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError

_SITES: tuple[Site, ...] = ("mlp_post",)

# So many neurons of each layer are looked at one by one.
TOP = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopNeurons:
    """The neurons of a layer that tell some concept best or, without concepts, have the largest
    kurtosis.

    `concept` is the number of the one that each tells best (-1: there is none), `sign` -1 where it
    is more active without it, `selective` whether it tells it beyond chance. `score` and `kurtosis`
    hold value, standard error and null. `counts` say how it scores in sequences that were not
    fitted, `contexts` on which of their tokens it is most active.
    """

    neuron: Int[Tensor, " chosen"]
    concept: Int[Tensor, " chosen"]
    sign: Int[Tensor, " chosen"]
    selective: Bool[Tensor, " chosen"]
    score: Float[Tensor, "3 chosen"]
    kurtosis: Float[Tensor, "3 chosen"]
    counts: Counts
    contexts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NeuronsSeen:
    """What neurons are like, by layer: `estimates` of whole layers, by the names of the fields, and
    their `top` neurons; of the layers in `reasons` nothing is known.

    `fitted` and `evaluated` count the sources of the two, `enough` says which concepts have
    enough tokens to say something of.
    """

    names: tuple[str, ...]
    layers: int
    enough: tuple[bool, ...]
    fitted: int
    evaluated: int
    estimates: Mapping[int, Mapping[str, Told]]
    top: Mapping[int, TopNeurons]
    reasons: Mapping[int, str]


class NeuronsCollector:
    """Adds up what `NeuronsSeen` tells of the neurons of all blocks."""

    sites: Collection[Site] = _SITES

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        labels = stimulus.labels
        if labels is None:
            raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
        self._parts, self._stimulus, self._labels = parts, stimulus, labels
        own = labels.values * labels.used
        fitting = labels.split != EVALUATION
        self._fitted, self._evaluated = (
            int(labels.sources(which)) for which in (fitting, ~fitting)
        )
        if not self._fitted:
            raise UnseenError("there are no sequences to fit on: pass more text")
        self._groups = max(2, min(GROUPS, self._fitted))
        self._group, self._place = labels.numbered(fitting) % self._groups, labels.place
        permuted = [permuted_labels(labels, seed=seed) for seed in range(PERMUTATIONS)]
        # [set concept batch position]: the concepts' own labels, then permuted ones.
        self._sets = torch.stack([own, *permuted])
        self._tokens = self._counted(labels, fitting)
        self._directions: dict[int, Tensor] = {}
        self._sums: dict[int, UnitSums] = {}
        self._told: dict[int, dict[str, Told]] = {}
        self._chosen: dict[int, _Chosen] = {}
        self._reasons: dict[int, str] = {}
        self._prepared: tuple[Chunk | None, list[Grouped]] = (None, [])

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Takes the neurons of some tokens."""
        del site
        if chunk.split == EVALUATION:
            if layer in self._chosen:
                self._chosen[layer].add(rows, chunk, self._labels, self._place)
            return
        if layer not in self._sums:
            neurons = rows.shape[1]
            if neurons not in self._directions:
                self._directions[neurons] = random_directions(neurons).to(rows.device)
            self._sums[layer] = UnitSums(
                rows,
                self._directions[neurons].to(rows.device),
                groups=self._groups,
                concepts=len(self._labels.names),
            )
        self._sums[layer].add(rows, self._grouped(chunk, rows.device))

    def turn(self, split: int) -> None:
        """Chooses neurons once all sequences to fit on were seen."""
        if split != SECOND_HALF:
            return
        for layer in list(self._sums):
            sums = self._sums.pop(layer)
            summary = Summary(sums, self._tokens.to(sums.shift.device))
            if summary.finite:
                self._told[layer] = summary.estimates()
                self._chosen[layer] = _Chosen(summary)
            else:
                self._reasons[layer] = "activations are not finite"

    def collected(self) -> NeuronsSeen:
        """What the neurons are like."""
        unseen = {
            block.layer: f"no neurons: {block.reasons.get('neurons', 'none were seen')}"
            for block in self._parts.blocks
            if block.layer not in self._told
        }
        return NeuronsSeen(
            names=self._labels.names,
            layers=len(self._parts.blocks),
            enough=tuple(self._tokens.enough.tolist()),
            fitted=self._fitted,
            evaluated=self._evaluated,
            estimates=self._told,
            top={layer: its.top(self._stimulus) for layer, its in self._chosen.items()},
            reasons=unseen | self._reasons,
        )

    def _counted(self, labels: Labels, fitting: Bool[Tensor, " batch"]) -> Tokens:
        member = torch.stack([fitting & (self._group == group) for group in range(self._groups)])
        sides = torch.stack([(self._sets > 0).sum(-1), (self._sets < 0).sum(-1)], dim=1)
        own = torch.einsum("scb,gb->gsc", sides[0].float(), member.float())
        return Tokens(
            seen=member.float() @ labels.used.sum(1).float(),
            sides=own,
            permuted=(sides[1:] * fitting).sum(-1).float(),
            enough=own.sum(0).amin(0) >= FEWEST,
        )

    def _grouped(self, chunk: Chunk, device: torch.device) -> list[Grouped]:
        """The tokens of a chunk by their groups; worked out once for all layers."""
        if self._prepared[0] is not chunk:
            labels = self._sets[:, :, chunk.row, chunk.position]
            sides = torch.stack([labels > 0, labels < 0], dim=1).float()
            group = self._group[chunk.row]
            grouped = []
            for number in group.unique().tolist():
                place = (group == number).nonzero().flatten()
                grouped.append(
                    Grouped(
                        group=number,
                        place=place.to(device),
                        sides=sides[..., place].to(device),
                    )
                )
            self._prepared = (chunk, grouped)
        return self._prepared[1]


class _Chosen:
    """The top neurons of a layer, and what they do in sequences that are not fitted."""

    def __init__(self, summary: Summary) -> None:
        best, concept = _best(summary.of_neurons(summary.scores[0]))
        if not best.any():
            kurtosis = summary.kurtosis[:1]
            best, concept = _best(summary.of_neurons(kurtosis))[0], torch.full_like(concept, -1)
        order = best.argsort(descending=True, stable=True)[:TOP]
        neuron = self.neuron = order[best[order] > 0]
        self.concept = concept[neuron]
        self._tells = bool((self.concept >= 0).all())
        self.kurtosis = torch.stack(
            [
                summary.kurtosis[0, neuron],
                jackknife_stderr(summary.kurtosis[1:, neuron]),
                torch.full(neuron.shape, summary.directions_kurtosis, device=neuron.device),
            ]
        )
        self._contexts = Contexts(len(neuron), neuron.device)
        nothing = torch.full(neuron.shape, torch.nan, device=neuron.device)
        if not self._tells:
            self.sign = torch.ones_like(neuron)
            self.selective = torch.zeros_like(neuron, dtype=torch.bool)
            self.score = torch.stack([nothing] * 3)
            self._scores = Scores(nothing, nothing)
            return
        scores = summary.scores[:, self.concept, neuron]
        self.sign = scores[0].sign().long()
        self.score = torch.stack(
            [scores[0].abs(), jackknife_stderr(scores[1:]), _by_chance(summary, len(neuron))]
        )
        self.selective = self.score[0] > summary.threshold[self.concept]
        middle = summary.middle[self.concept, neuron]
        self._scores = Scores(self.sign * middle, summary.deviation[self.concept, neuron])

    def add(
        self,
        rows: Float[Tensor, "token neuron"],
        chunk: Chunk,
        labels: Labels,
        place: Int[Tensor, " batch"],
    ) -> None:
        """Takes the neurons of some tokens that were not fitted; `place` is that of `labels`."""
        if not len(self.neuron):
            return
        active = rows.index_select(1, self.neuron).float()
        self._contexts.add(active, chunk)
        if self._tells:
            told = chunk.of(labels.values[self.concept.to(labels.values.device)])
            group = place[chunk.row].to(active.device)
            self._scores.add((self.sign * active).T, told.to(active.device), group)

    def top(self, stimulus: Stimulus) -> TopNeurons:
        """What they did, on the CPU."""
        return TopNeurons(
            neuron=self.neuron.cpu(),
            concept=self.concept.cpu(),
            sign=self.sign.cpu(),
            selective=self.selective.cpu(),
            score=self.score.cpu(),
            kurtosis=self.kurtosis.cpu(),
            counts=self._scores.counts,
            contexts=self._contexts.words(stimulus),
        )


def _best(
    scores: Float[Tensor, "concept neuron"],
) -> tuple[Float[Tensor, " neuron"], Int[Tensor, " neuron"]]:
    if not len(scores):
        none = scores.new_zeros(scores.shape[1])
        return none, none.long()
    best, concept = scores.max(0)
    return best, concept


def _by_chance(summary: Summary, chosen: int) -> Float[Tensor, " chosen"]:
    """The scores of as many neurons that are best for permuted labels."""
    best = summary.of_neurons(summary.chance).amax(1)
    return best.sort(dim=1, descending=True).values[:, :chosen].mean(0)
