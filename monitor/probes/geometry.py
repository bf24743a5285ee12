"""Geometry: at which angles the directions of concepts lie to each other.

`cosine` is that of the two diff-in-means directions δ (Park et al. 2024, "The Linear Representation
Hypothesis and the Geometry of Large Language Models"), `cosine_whitened` the same where distances
are measured in units of how tokens scatter, δᵀΣ⁻¹δ′ / √(δᵀΣ⁻¹δ · δ′ᵀΣ⁻¹δ′) with the mass-mean
direction as Σ⁻¹δ: a few features of large values, which bring all directions of a stream together,
do not count for more there, and no linear change of basis matters. Directions drawn at random in d
dimensions have the cosine 0 with standard deviation 1/√d, and in the mean the absolute cosine
Γ(d/2) / (√π Γ((d+1)/2)), about √(2/πd): the interference of features that know nothing of each
other (Elhage et al. 2022, "Toy Models of Superposition"). Where labels mean nothing diff-in-means
finds directions in the fewer dimensions in which tokens differ, and there is more of it by chance:
that is the null of `cosine`, and random directions are that of `interference`.

Half the difference of what the two fitted halves found, ε, is as large as the error of a direction
found on both. To first order it moves the cosine c of unit directions u, u′ by
(u′ − cu)·ε/|δ| + (u − cu′)·ε′/|δ′|. One such number is a rough standard error, so its square is
pooled over the pairs of a layer as a share of (1 − c²)(|ε|²/|δ|² + |ε′|²/|δ′|²), together with a
few pairs' worth of the share that it is where noise has no more to do with one direction than with
others: 1 / dimensions of the noise. Where these are few it stays rough, and may be too small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64, Int8
from torch import Tensor

from monitor.estimate import jackknife_stderr, left_in
from monitor.evidence import Evidence, unseen
from monitor.features import METHODS, NO_CONCEPTS, Directions
from monitor.labels import EVALUATION, FEWEST, Labels
from monitor.record import STREAM_LAYER, Dim, Field, ProbeSpec

# So many pairs weigh as much as what is expected of noise.
_EXPECTED = 4

_NOISE = (
    "Directions found on few tokens are noisy, and noise makes them orthogonal: see "
    "cosine_disattenuated."
)
_OVERLAP = "Two concepts that the same tokens have lie alike whatever the model: see label_overlap."

SPEC = ProbeSpec(
    name="geometry",
    help="Angles between the directions of every two concepts in the residual stream.",
    source="Park et al. 2024, The Linear Representation Hypothesis and the Geometry of Large "
    "Language Models; Elhage et al. 2022, Toy Models of Superposition",
    dims=(
        STREAM_LAYER,
        Dim(name="concept", help="A concept.", text=True),
        Dim(name="other", help="Another concept, given after it.", text=True),
    ),
    fields=(
        Field(
            name="cosine",
            help="Cosine between the diff-in-means directions.",
            low=-1,
            high=1,
            null="0: labels drawn at random",
            null_sd=True,
            fooled_by=f"{_OVERLAP} {_NOISE} Where few features have large values directions lie "
            "along these: see cosine_whitened.",
        ),
        Field(
            name="cosine_disattenuated",
            help="The same without what noise in the directions takes from it: of the directions "
            "of different halves, in units of how alike the halves' directions are.",
            null="0: labels drawn at random",
            null_sd=True,
            fooled_by=f"{_OVERLAP} It goes beyond 1 where directions are hardly found, and is "
            "missing where halves disagree.",
        ),
        Field(
            name="cosine_whitened",
            help="The same where distances are in units of how far tokens scatter.",
            low=-1,
            high=1,
            null="0: random directions",
            null_sd=True,
            fooled_by=f"{_OVERLAP} Concepts that tokens have independently of each other come out "
            "orthogonal at any angle where they make most of the scatter. The covariance is shrunk "
            "and, where there are fewer tokens than features, hardly known.",
        ),
        Field(
            name="interference",
            help="Absolute cosine; averaged over the pairs of a layer, its mean interference.",
            low=0,
            high=1,
            null="that of random directions, about √(2 / π features)",
            null_sd=True,
            fooled_by=f"{_OVERLAP} Of a small cosine it is in the mean too large, by its error.",
        ),
        Field(
            name="label_overlap",
            help="Correlation (φ) of the two concepts' labels, on the tokens where both count.",
            low=-1,
            high=1,
            null="0: independent labels",
            fooled_by="Labels are balanced by leaving tokens out, so rare concepts may have few "
            "tokens in common with others.",
        ),
    ),
    needs=(("concepts", "directions"),),
)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row a layer and pair of concepts, from the directions on `concepts`."""
    directions, why = evidence.collected("directions")
    if directions is None:
        return unseen(SPEC, why)
    names = directions.names
    if len(names) < 2:
        return unseen(
            SPEC, NO_CONCEPTS if not names else f"only {names[0]!r} was given: pass another"
        )
    labels = evidence.observations["concepts"].stimulus.labels
    if labels is None:
        return unseen(SPEC, "the stimulus has no labels")
    pairs = list(itertools.combinations(range(len(names)), 2))
    n = int((labels.split != EVALUATION).sum())
    overlaps = [_overlap(labels, names[one], names[other]) for one, other in pairs]
    columns: dict[str, list[Any]] = {
        name: [] for name in ("layer", "concept", "other", "n", "validity", *_VALUES)
    }
    few = directions.too_few.tolist()
    for place, layer in enumerate(directions.layers):
        cosines = _angles(directions, place)
        for (one, other), overlap in zip(pairs, overlaps, strict=True):
            lost = [names[concept] for concept in (one, other) if few[concept]]
            row: dict[str, Any] = {**dict.fromkeys(_VALUES), **overlap}
            if not lost:
                angles = {name: values[one, other].item() for name, values in cosines.items()}
                hardly = not math.isfinite(angles["cosine_disattenuated"])
                row |= {
                    name: None if hardly and "disattenuated" in name else value
                    for name, value in angles.items()
                }
                row |= _nulls(directions.vectors.shape[-1])
            row |= {"layer": layer, "concept": names[one], "other": names[other], "n": n}
            row["validity"] = (
                f"too few tokens of {lost[0]!r}: {FEWEST} of a side are needed" if lost else "ok"
            )
            for column, value in row.items():
                columns[column].append(value)
    return columns


_VALUES = tuple(column for field in SPEC.fields for column in field.columns)


def _nulls(features: int) -> dict[str, float]:
    """Of random directions: the density of their cosine is (1 − c²)^((d−3)/2)."""
    log_ratio = math.lgamma(features / 2) - math.lgamma((features + 1) / 2)
    mean = math.exp(log_ratio) / math.sqrt(math.pi)
    return {
        "cosine_whitened_null_sd": 1 / math.sqrt(features),
        "interference_null": mean,
        "interference_null_sd": math.sqrt(max(0.0, 1 / features - mean**2)),
        "label_overlap_null": 0.0,
    } | {f"cosine{kind}_null": 0.0 for kind in ("", "_disattenuated", "_whitened")}


def _angles(directions: Directions, place: int) -> dict[str, Float64[Tensor, "concept concept"]]:
    """The columns of a layer that there are for every two concepts."""
    vectors = directions.vectors[place].double()
    halves = directions.halves[:, place].double()
    diff, mass = METHODS.index("diff_in_means"), METHODS.index("mass_mean")
    plain = [vectors[:, diff], *halves[:, :, diff]]
    whitened = [vectors[:, mass], *halves[:, :, mass]]
    features = plain[0].shape[1]
    # Where the stream is still zero nothing is known of it.
    dimensions = float(directions.dimensions[place, diff].nan_to_num(features))
    cosine, stderr, disattenuated, inflation = _cosines(plain, plain, dimensions)
    in_scatter, in_scatter_stderr, _, _ = _cosines(plain, whitened, float(features))
    return {
        "cosine": cosine,
        "cosine_stderr": stderr,
        "cosine_null_sd": torch.full_like(cosine, dimensions**-0.5),
        "cosine_disattenuated": disattenuated,
        "cosine_disattenuated_stderr": stderr * inflation,
        "cosine_disattenuated_null_sd": inflation * dimensions**-0.5,
        "cosine_whitened": in_scatter,
        "cosine_whitened_stderr": in_scatter_stderr,
        "interference": cosine.abs(),
        "interference_stderr": stderr,
    }


def _cosines(
    vectors: list[Float64[Tensor, "concept feature"]],
    duals: list[Float64[Tensor, "concept feature"]],
    dimensions: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each two concepts the cosine, its standard error, the disattenuated cosine, and how much
    larger that is; from what was found on all fitted tokens and on each half. A vector's inner
    product with another is that with the other's dual. Noise is spread over so many `dimensions`.
    """
    products = _symmetric(vectors[0] @ duals[0].T)
    length = products.diagonal().sqrt()
    lengths = length[:, None] * length
    cosines = (products / lengths).clamp(-1, 1)
    error = (vectors[1] - vectors[2]) / 2
    dual_error = (duals[1] - duals[2]) / 2
    moved = error @ duals[0].T
    own = moved.diagonal() / length.square()
    moves = (moved + moved.T) / lengths - cosines * (own[:, None] + own)
    size = (error * dual_error).sum(-1).abs() / length.square()
    scale = (1 - cosines.square()) * (size[:, None] + size)
    shares = (moves.square() / scale)[torch.ones_like(scale).triu(1).bool()]
    shares = shares[shares.isfinite()]
    pooled = (shares.sum() + _EXPECTED / dimensions) / (len(shares) + _EXPECTED)
    between = _symmetric(vectors[1] @ duals[2].T)
    alike = between.diagonal()
    # Halves that disagree leave nothing to correct with.
    reliable = torch.where(alike > 0, alike, torch.nan).sqrt()
    corrected = between / (reliable[:, None] * reliable)
    return (
        cosines,
        (pooled * scale).clamp(min=0).sqrt(),
        corrected,
        lengths / (reliable[:, None] * reliable),
    )


def _symmetric(products: Float64[Tensor, "concept concept"]) -> Float64[Tensor, "concept concept"]:
    """One product of the two that rounding, or a dual of another half, makes different."""
    return (products + products.T) / 2


def _overlap(labels: Labels, concept: str, other: str) -> Mapping[str, float | None]:
    """φ of two concepts' labels, with its jackknife over groups of sources; None where the tokens
    on which both count all have, or all lack, one of them.
    """
    one, two = (labels.values[labels.names.index(name)] for name in (concept, other))
    per_sequence = _table(one * labels.used, two * labels.used)
    number = labels.numbered(torch.ones_like(labels.source, dtype=torch.bool))
    counts = per_sequence.new_zeros(int(number.max()) + 1, 2, 2).index_add(0, number, per_sequence)
    kept = left_in(len(counts)).double()
    phi = _phi(counts.sum(0))
    if not bool(phi.isfinite()):
        return {"label_overlap": None, "label_overlap_stderr": None}
    without = _phi(torch.einsum("gb,bij->gij", kept, counts))
    stderr = jackknife_stderr(without[without.isfinite()]) if bool(without.isfinite().any()) else 0
    return {"label_overlap": phi.item(), "label_overlap_stderr": float(stderr)}


def _table(
    one: Int8[Tensor, "batch position"], two: Int8[Tensor, "batch position"]
) -> Float64[Tensor, "batch side other_side"]:
    """How many tokens of each sequence have or lack the one and the other."""
    rows = [
        torch.stack([((one == side) & (two == beside)).sum(1) for beside in (1, -1)], dim=1)
        for side in (1, -1)
    ]
    return torch.stack(rows, dim=1).double()


def _phi(table: Float[Tensor, "*left_out side other_side"]) -> Float[Tensor, "*left_out"]:
    (both, first), (second, neither) = ((row[..., 0], row[..., 1]) for row in table.unbind(-2))
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    return (both * neither - first * second) / margins.sqrt()
