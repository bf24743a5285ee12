"""Tables that nobody measured, for the probes that read other probes' tables.

A head attends evenly, copies nothing and writes nothing unless `heads` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from monitor.evidence import Evidence

Head = tuple[int, int]

SCORES = ("prefix_matching", "previous_token", "duplicate_token", "first_token", "same_offset")
NULL, STDERR, SEQUENCES = 0.05, 0.01, 16
RANDOM_RATIO, RANDOM_SD = 0.12, 0.01

PREVIOUS = {"previous_token": 0.9, "same_offset": 0.85}
INDUCTION = {"prefix_matching": 0.8, "eigenvalue_score": 0.9, "contrast": 3.0}
EVEN: dict[str, float] = {}


def evidence(
    heads: Mapping[Head, Mapping[str, Any]],
    *,
    edges: Mapping[tuple[Head, Head], float] | None = None,
    groups: Sequence[tuple[str, str, Mapping[str, float]]] = (),
    without: Sequence[str] = (),
) -> Evidence:
    """`edges` are K-compositions in standard deviations above random matrices; `groups` pairs of a
    name and its heads, with `over_random` by the method of ablation (its stderr is 0.1).
    """
    tables = {
        "induction": induction(heads),
        "copying": copying(heads),
        "attribution": attribution(heads),
        "composition": composition(edges or {}),
    }
    if groups:
        tables["ablation"] = ablation(groups)
    return Evidence(
        observations={}, tables={name: t for name, t in tables.items() if name not in without}
    )


def induction(heads: Mapping[Head, Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors, as the probe has them."""
    columns: dict[str, Any] = dims(heads)
    for score in SCORES:
        columns[score] = torch.tensor([told.get(score, NULL) for told in heads.values()])
        stderr = [told.get(f"{score}_stderr", STDERR) for told in heads.values()]
        columns[f"{score}_stderr"] = torch.tensor(stderr)
        null = [told.get(f"{score}_null", NULL) for told in heads.values()]
        columns[f"{score}_null"] = torch.tensor(null)
    return columns | {
        "n": [SEQUENCES] * len(heads),
        "validity": [told.get("validity", "ok") for told in heads.values()],
    }


def copying(heads: Mapping[Head, Mapping[str, Any]]) -> dict[str, Any]:
    """Lists of numbers, and None for heads whose `eigenvalue_score` is None."""
    values = [told.get("eigenvalue_score", 0.0) for told in heads.values()]
    return {
        **dims(heads),
        "eigenvalue_score": values,
        "eigenvalue_score_null": [None if value is None else 0.0 for value in values],
        "eigenvalue_score_null_sd": [None if value is None else 0.1 for value in values],
        "n": [64] * len(heads),
        "validity": ["ok" if value is not None else "no W_O was found" for value in values],
    }


def attribution(heads: Mapping[Head, Mapping[str, Any]]) -> dict[str, Any]:
    """NumPy arrays; other components that bear a head's numbers come last, to confuse."""
    contrast = np.array([told.get("contrast", 0.0) for told in heads.values()], dtype=float)
    layers, numbers = np.array([*heads]).T
    return {
        "component": ["head"] * len(heads) + ["mlp"] * len(heads),
        "layer": np.tile(layers, 2),
        "head": np.tile(numbers, 2),
        "contrast": np.concatenate([contrast, np.full(len(heads), 99.0)]),
        "contrast_stderr": np.full(2 * len(heads), 0.1),
        "contrast_null": np.zeros(2 * len(heads)),
        "n": np.full(2 * len(heads), SEQUENCES),
        "validity": ["ok"] * 2 * len(heads),
    }


def composition(edges: Mapping[tuple[Head, Head], float]) -> dict[str, Any]:
    """Every edge as one of the keys, and a far stronger one of the values, to confuse."""
    rows = [
        (*s, *t, kind, sds + 90 * (kind == "v")) for kind in "kv" for (s, t), sds in edges.items()
    ]
    names = ("source_layer", "source_head", "target_layer", "target_head", "kind", "sds")
    columns: dict[str, Any] = {
        name: [row[place] for row in rows] for place, name in enumerate(names)
    }
    ratio = RANDOM_RATIO + RANDOM_SD * np.array(columns.pop("sds"))
    return columns | {
        "ratio": ratio,
        "ratio_null": np.full(len(rows), RANDOM_RATIO),
        "ratio_null_sd": np.full(len(rows), RANDOM_SD),
        "n": [64] * len(rows),
        "validity": ["ok"] * len(rows),
    }


def ablation(groups: Sequence[tuple[str, str, Mapping[str, float]]]) -> dict[str, Any]:
    """A row for each group and method."""
    rows = [(g, heads, m, over) for g, heads, by in groups for m, over in by.items()]
    return {
        "group": [row[0] for row in rows],
        "layer": [-1] * len(rows),
        "head": [-1] * len(rows),
        "method": [row[2] for row in rows],
        "heads": [row[1] for row in rows],
        "over_random": torch.tensor([row[3] for row in rows]),
        "over_random_stderr": torch.full((len(rows),), 0.1),
        "over_random_null": torch.zeros(len(rows)),
        "n": [SEQUENCES] * len(rows),
        "validity": ["ok"] * len(rows),
    }


def dims(heads: Mapping[Head, Any]) -> dict[str, Any]:
    return {"layer": [layer for layer, _ in heads], "head": [head for _, head in heads]}
