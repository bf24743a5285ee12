"""Slow and obvious versions of sparse probing, from all activations at once.

Arrays are float64: `rows` [token, neuron], `having` [token] whether a token has the concept.
"""

import numpy as np


def separation(rows: np.ndarray, having: np.ndarray) -> np.ndarray:
    """Difference of the classes' means in standard deviations within them, a number a neuron."""
    scores = []
    for neuron in rows.T:
        with_it, without = neuron[having], neuron[~having]
        apart = abs(with_it.mean() - without.mean())
        squares = ((with_it - with_it.mean()) ** 2).sum() + ((without - without.mean()) ** 2).sum()
        scores.append(apart / np.sqrt(squares / len(neuron)) if apart else 0.0)
    return np.array(scores)


def best(rows: np.ndarray, having: np.ndarray, k: int) -> list[int]:
    return np.argsort(-separation(rows, having), kind="stable")[:k].tolist()


def discriminant(rows: np.ndarray, having: np.ndarray, chosen: list[int]):
    """What a shrunk linear discriminant on the `chosen` neurons says of other rows."""
    own = rows[:, chosen]
    means = own[having].mean(0), own[~having].mean(0)
    centred = own - np.where(having[:, None], *means)
    deviation = centred.std(0)
    k, n = len(chosen), len(own)
    shrinkage = k / (n + k)
    correlation = (centred / deviation).T @ (centred / deviation) / n
    shrunk = (1 - shrinkage) * correlation + shrinkage * np.eye(k)
    weights = np.linalg.inv(shrunk) @ ((means[0] - means[1]) / deviation) / deviation
    middle = (means[0] + means[1]) / 2
    return lambda others: (others[:, chosen] - middle) @ weights > 0


def f1(said: np.ndarray, having: np.ndarray) -> float:
    """Harmonic mean of precision and recall, with as much weight on either side."""
    weight = np.where(having, 1 / having.sum(), 1 / (~having).sum())
    right = weight[said & having].sum()
    precision, recall = right / weight[said].sum(), right / weight[having].sum()
    return 2 * precision * recall / (precision + recall)
