"""Labels of concepts put onto other sequences than their own.

Tokens of one source are alike, and so are their labels: of a text that is all of one class, or of
words inside a comment. Labels shuffled token by token would lose that, and promise that chance
makes less than it does. So the labels of whole sources change places, and are turned around in
themselves.

Shapes: `concept` what tokens are labelled with; `batch` sequences of `position` token ids.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int8
from torch import Tensor, from_numpy

from monitor.labels import EVALUATION, Labels


def permuted_labels(labels: Labels, *, seed: int) -> Int8[Tensor, "concept batch position"]:
    """Each concept's labels in the sequences to fit on, at the tokens that have one: each source's
    exchanged for those of another one, begun at a random place. Nothing counts in the other
    sequences.

    Where there are more than needed they are cut, where there are fewer they begin again.
    """
    random = np.random.default_rng([seed, 4])
    values = (labels.values * labels.used).numpy()
    number = labels.numbered(labels.split != EVALUATION).numpy()
    permuted = np.zeros_like(values)
    for own, given in zip(values, permuted, strict=True):
        # Only where labels count: elsewhere tokens may be quite different ones.
        there, counts = np.nonzero(own), own != 0
        order = random.permutation(np.setdiff1d(number[counts.any(1)], [-1]))
        # Nobody keeps what is its own, as long as there is another.
        step = int(random.integers(1, max(2, len(order))))
        told, of_token = own[there], number[there[0]]
        for source, other in zip(order, np.roll(order, step), strict=True):
            place = tuple(axis[of_token == source] for axis in there)
            labelled = told[of_token == other]
            turned = np.roll(labelled, random.integers(len(labelled)))
            given[place] = np.resize(turned, len(place[0]))
    return from_numpy(permuted)
