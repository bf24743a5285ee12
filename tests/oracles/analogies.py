"""Slow and obvious versions of what `analogies` says; `vectors` are float64, by a word's id."""

import itertools
import math

import numpy as np


def cosine(one, other):
    return float(one @ other / math.sqrt((one @ one) * (other @ other)))


def answer(vectors, candidates, plus, minus=()):
    """The candidate that is nearest to a sum of unit vectors."""
    target = sum(vectors[w] / np.linalg.norm(vectors[w]) for w in plus)
    target = target - sum(vectors[w] / np.linalg.norm(vectors[w]) for w in minus)
    return max(candidates, key=lambda w: cosine(vectors[w], target))


def accuracies(vectors, quadruples):
    """accuracy, accuracy_inputs_allowed, accuracy_without_offset."""
    hits = {"excluded": [], "allowed": [], "from_a": [], "from_c": []}
    for a, b, c, d in quadruples:
        others = [w for w in vectors if w not in {a, b, c}]
        hits["excluded"].append(answer(vectors, others, [a, c], [b]) == d)
        hits["allowed"].append(answer(vectors, list(vectors), [a, c], [b]) == d)
        hits["from_a"].append(answer(vectors, others, [a]) == d)
        hits["from_c"].append(answer(vectors, others, [c]) == d)
    share = {name: float(np.mean(given)) for name, given in hits.items()}
    return share["excluded"], share["allowed"], max(share["from_a"], share["from_c"])


def pairs(quadruples):
    return sorted({p for a, b, c, d in quadruples for p in ((a, b), (d, c))})


def offset_similarity(vectors, quadruples):
    return float(
        np.mean(
            [
                cosine(vectors[a] - vectors[b], vectors[c] - vectors[d])
                for (a, b), (c, d) in itertools.combinations(pairs(quadruples), 2)
                if not {a, b} & {c, d}
            ]
        )
    )


def stderr(quadruples, estimate):
    """The jackknife that leaves out each word, those in the same quadruples as one."""
    words = {w for q in quadruples for w in q}
    left = {tuple(q for q in quadruples if w not in q) for w in words} - {()}
    values = [estimate(list(some)) for some in left]
    groups = len(values)
    return math.sqrt((groups - 1) / groups * sum((v - np.mean(values)) ** 2 for v in values))
