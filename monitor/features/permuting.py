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
    """Each concept's labels in the sequences to fit on, each exchanged for those of another one
    that has any and begun at a random place; nothing counts in the others.

    Labels of a longer sequence are cut, those of a shorter one go on from their beginning.
    """
    random = np.random.default_rng([seed, 4])
    values = (labels.values * labels.used).numpy()
    length = labels.length.tolist()
    fitting = (labels.split != EVALUATION).numpy()
    permuted = np.zeros_like(values)
    for concept, own in enumerate(values):
        order = random.permutation(np.flatnonzero(fitting & (own != 0).any(1)))
        # Nobody keeps what is its own, as long as there is another.
        step = int(random.integers(1, max(2, len(order))))
        for row, source in zip(order, np.roll(order, step), strict=True):
            given = own[source, 1 : length[source]]
            turned = np.roll(given, random.integers(len(given)))
            permuted[concept, row, 1 : length[row]] = np.resize(turned, length[row] - 1)
    return from_numpy(permuted)
