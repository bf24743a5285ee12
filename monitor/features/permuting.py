"""Labels of concepts put onto other sequences than their own.

Tokens of one sequence are alike, and so are their labels: of a text that is all of one class, or
of words inside a comment. Labels shuffled token by token would lose that, and promise that chance
makes less than it does. So whole sequences of labels change places, and are turned around in
themselves.

Shapes: `concept` what tokens are labelled with; `batch` sequences of `position` token ids.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int8
from torch import Tensor, from_numpy

from monitor.labels import EVALUATION, Labels


def permuted_labels(labels: Labels, *, seed: int) -> Int8[Tensor, "concept batch position"]:
    """Each concept's labels in the sequences to fit on, at the tokens that have one: each
    sequence's exchanged for those of another one, begun at a random place. Nothing counts in the
    others.

    Where there are more than needed they are cut, where there are fewer they begin again.
    """
    random = np.random.default_rng([seed, 4])
    values = (labels.values * labels.used).numpy()
    fitting = (labels.split != EVALUATION).numpy()
    permuted = np.zeros_like(values)
    for concept, own in enumerate(values):
        order = random.permutation(np.flatnonzero(fitting & (own != 0).any(1)))
        # Nobody keeps what is its own, as long as there is another.
        step = int(random.integers(1, max(2, len(order))))
        for row, source in zip(order, np.roll(order, step), strict=True):
            # Only where labels count: elsewhere tokens may be quite different ones.
            given, there = own[source][own[source] != 0], own[row] != 0
            turned = np.roll(given, random.integers(len(given)))
            permuted[concept, row, there] = np.resize(turned, there.sum())
    return from_numpy(permuted)
