"""How the words of analogies lie in the residual stream: the inner products of all of them.

What analogies ask for follows from inner products alone, and these are no more the wider the stream
is and the more often a word occurs.

Shapes: `layer` what enters the first block and then what each returns; `word` a token id.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from monitor.features.collecting import Chunk
from monitor.parts import Parts, Site
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WordProducts:
    """Inner products of the stream at every two words of a stimulus, after each of the `layers`
    (-1: before the first block); `ids` are the words' token ids, in increasing order.
    """

    layers: tuple[int, ...]
    ids: Int[Tensor, " word"]
    products: Float64[Tensor, "layer word word"]


class WordProductsCollector:
    """Collects `WordProducts`. Vectors of words are kept until a layer's are complete.

    Raises `UnseenError` where the stimulus has no words.
    """

    sites: Collection[Site] = ("residual_before", "residual_after")

    def __init__(self, parts: Parts, stimulus: Stimulus) -> None:
        labels = stimulus.labels
        if labels is None or not bool((labels.values == 1).any()):
            raise UnseenError("no analogies were given: pass Analogies(...) in concepts=")
        row, position = (labels.values == 1).any(0).nonzero(as_tuple=True)
        self._ids, of_row = stimulus.tokens[row, position].unique(return_inverse=True)
        # Each word is read once, wherever it comes first.
        self._word = torch.full(stimulus.tokens.shape, -1)
        first = torch.full((len(self._ids),), len(row)).scatter_reduce(
            0, of_row, torch.arange(len(row)), reduce="amin"
        )
        self._word[row[first], position[first]] = torch.arange(len(first))
        self._layers = range(-1, len(parts.blocks))
        self._left = dict.fromkeys(self._layers, len(first))
        self._vectors: dict[int, Float[Tensor, "word feature"]] = {}
        self._products: dict[int, Float64[Tensor, "word word"]] = {}

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Takes the vectors of words that were not seen before."""
        if site == "residual_before":
            if layer != 0:
                return
            layer = -1
        word = self._word[chunk.row, chunk.position]
        new = (word >= 0).nonzero().flatten()
        if not len(new):
            return
        if layer not in self._vectors:
            self._vectors[layer] = rows.new_zeros(len(self._ids), rows.shape[1])
        self._vectors[layer][word[new].to(rows.device)] = rows[new.to(rows.device)]
        self._left[layer] -= len(new)
        if not self._left[layer]:
            # What all words have in common is large beside what tells them apart: float64 keeps
            # the digits of their differences.
            vectors = self._vectors.pop(layer).cpu().double()
            self._products[layer] = vectors @ vectors.T

    def turn(self, split: int) -> None:
        """Nothing is fitted."""

    def collected(self) -> WordProducts:
        """What was collected; raises `UnseenError` where words were not seen in a layer."""
        if unseen := [layer for layer in self._layers if layer not in self._products]:
            raise UnseenError(f"the stream of layers {unseen} was not seen at all words")
        return WordProducts(
            layers=tuple(self._layers),
            ids=self._ids,
            products=torch.stack([self._products[layer] for layer in self._layers]),
        )
