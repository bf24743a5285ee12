"""What neurons are like, one at a time, with SciPy's moments."""

from __future__ import annotations

import numpy as np
from scipy.stats import kurtosis


def kurtoses(rows):
    """Of tokens [token neuron], by neuron."""
    return np.array([kurtosis(own, fisher=False, bias=True) for own in rows.T.astype(float)])


def score(activation, labels):
    """Difference of the means in standard deviations of the tokens that count."""
    activation = activation.astype(float)
    having, lacking = activation[labels > 0], activation[labels < 0]
    return (having.mean() - lacking.mean()) / np.concatenate([having, lacking]).std()


def scores(rows, labels):
    """[concept neuron], from labels [concept token]."""
    return np.array([[score(own, of_one) for own in rows.T] for of_one in labels])


def dead_share(rows, share=0.01):
    rows = rows.astype(float)
    typical = np.mean([np.sqrt(np.mean(own**2)) for own in rows.T])
    return np.mean([np.abs(own).max() <= share * typical for own in rows.T])


def class_selectivity(rows, labels):
    told = []
    for own in rows.T.astype(float):
        means = sorted((own[of_one > 0].mean() for of_one in labels), reverse=True)
        if means[0] > 0:
            rest = np.mean(means[1:])
            told.append((means[0] - rest) / (means[0] + rest))
    return np.mean(told)


def contexts(active, tokens, length, rows, *, most=5, before=8, after=3):
    """The most active tokens of a neuron, activations [batch position], at most one a sequence."""
    best = []
    for row in rows:
        position = max(range(1, length[row]), key=lambda place: active[row, place])
        best.append((active[row, position], row, position))
    told = []
    for _, row, position in sorted(best, key=lambda one: -one[0])[:most]:
        words = []
        for place in range(max(0, position - before), min(length[row], position + after + 1)):
            word = str(int(tokens[row, place]))
            words.append(f"[{word}]" if place == position else word)
        told.append(" ".join(words))
    return " | ".join(told)
