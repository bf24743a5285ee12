"""The progress measures of Nanda et al. 2023 by their definition: waves over pairs written out, and
logits projected on them, in plain loops.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def waves(p: int, frequency: int) -> list[np.ndarray]:
    """Unit vectors over all pairs: the cosine and the sine of 2π k (a + b) / p, where not zero."""
    at = [2 * math.pi * frequency * (a + b) / p for a in range(p) for b in range(p)]
    both = [np.array([wave(x) for x in at]) for wave in (math.cos, math.sin)]
    return [wave / np.linalg.norm(wave) for wave in both if np.linalg.norm(wave) > 1e-6]


def component(logits: Tensor, frequencies: list[int]) -> np.ndarray:
    """What of the logits [question number] lies along the waves of these frequencies."""
    rows = logits.double().numpy()
    p, total = rows.shape[1], np.zeros_like(rows)
    for frequency in frequencies:
        for wave in waves(p, frequency):
            for number in range(p):
                total[:, number] += wave * float(wave @ rows[:, number])
    return total


def loss(rows: np.ndarray, questions: list[int]) -> float:
    """Mean cross-entropy of the right sums of some questions."""
    p, losses = rows.shape[1], []
    for question in questions:
        a, b = divmod(question, p)
        logits = rows[question]
        top = logits.max()
        normaliser = top + math.log(sum(math.exp(x - top) for x in logits))
        losses.append(normaliser - logits[(a + b) % p])
    return sum(losses) / len(losses)


def restricted_loss(logits: Tensor, keys: list[int]) -> float:
    """On all pairs, of the mean over pairs and the waves of the key frequencies."""
    rows = logits.double().numpy()
    return loss(rows.mean(0) + component(logits, keys), list(range(len(rows))))


def excluded_loss(logits: Tensor, keys: list[int], train: list[int]) -> float:
    """On the training pairs, of all but the waves of the key frequencies."""
    return loss(logits.double().numpy() - component(logits, keys), train)


def norms(logits: Tensor) -> list[float]:
    """The norm of each frequency's waves, of logits less their mean over numbers; over pairs of one
    sum, which are p each, it counts once.
    """
    centred, p = logits.double() - logits.double().mean(1, keepdim=True), logits.shape[1]
    found = [np.linalg.norm(component(centred, [k])) for k in range(1, p // 2 + 1)]
    return [float(norm) / math.sqrt(p) for norm in found]


def norms_of_rows(rows: Tensor) -> list[float]:
    """The same of an embedding [number feature], whose waves are of single numbers."""
    p, values, found = len(rows), rows.double().numpy(), []
    for frequency in range(1, p // 2 + 1):
        at = [2 * math.pi * frequency * n / p for n in range(p)]
        square = 0.0
        for wave in (np.cos(at), np.sin(at)):
            if np.linalg.norm(wave) > 1e-6:
                square += float(((wave / np.linalg.norm(wave)) @ values) @ (
                    (wave / np.linalg.norm(wave)) @ values
                ))  # fmt: skip
        found.append(math.sqrt(square))
    return found


def gini(values: list[float]) -> float:
    """Mean difference of two values over twice their mean."""
    n = len(values)
    differences = sum(abs(one - other) for one in values for other in values)
    return differences / (2 * n * sum(values))


def clustered_stderr(losses: dict[int, list[float]]) -> float:
    """Of a mean over pairs, where pairs of one sum are one sample: from the residual of each."""
    count = sum(map(len, losses.values()))
    mean = sum(map(sum, losses.values())) / count
    clusters = len(losses)
    squares = sum(sum(x - mean for x in each) ** 2 for each in losses.values())
    return math.sqrt(squares * clusters / (clusters - 1)) / count


def random_logits(p: int, *, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(p * p, p, generator=random, dtype=torch.float64) * 2
