"""Labels that mean nothing, beside which those of concepts are put.

Shapes: `concept` what tokens are labelled with; `batch` sequences of `position` token ids; `task`
the concept and its control; `split` of the sequences; `side` having it and lacking it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int, Int8

from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.stimuli import Stimulus


def control_labels(
    stimulus: Stimulus, *, seed: int = 0
) -> Int8[torch.Tensor, "concept batch position"]:
    """Of each concept's control task (Hewitt & Liang 2019): the same tokens count, and every token
    id has a side of its own, drawn at random. What does well at it has learnt token ids by heart.
    """
    labels = _labels(stimulus)
    random = np.random.default_rng([seed, 1])
    vocabulary = int(stimulus.tokens.max()) + 1
    sides = random.integers(0, 2, size=(len(labels.names), vocabulary), dtype=np.int8) * 2 - 1
    return torch.from_numpy(sides)[:, stimulus.tokens] * (labels.values != 0)


def shuffled_labels(
    stimulus: Stimulus, *, seed: int = 0
) -> Int8[torch.Tensor, "concept batch position"]:
    """Each concept's labels in another order, among the tokens that count in the same split."""
    labels = _labels(stimulus)
    random = np.random.default_rng([seed, 2])
    shuffled = labels.values.numpy().copy()
    splits = labels.split.numpy()[:, None]
    for values in shuffled:
        for split in np.unique(splits):
            counting = (values != 0) & (splits == split)
            values[counting] = random.permutation(values[counting])
    return torch.from_numpy(shuffled)


def tokens_counted(
    labels: Int[torch.Tensor, "task concept batch position"], split: Int[torch.Tensor, " batch"]
) -> Int[torch.Tensor, "task concept split side"]:
    """How many tokens of each split are on either side: those that have it, those that lack it."""
    sides = torch.stack([(labels > 0).sum(-1), (labels < 0).sum(-1)], dim=-1)
    splits = (FIRST_HALF, SECOND_HALF, EVALUATION)
    return torch.stack([sides[:, :, split == each].sum(2) for each in splits], dim=2)


def _labels(stimulus: Stimulus) -> Labels:
    if stimulus.labels is None:
        raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
    return stimulus.labels
