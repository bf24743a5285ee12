"""Superposition: how concept directions share dimensions, and what an MLP's neurons compute.

Of the directions W_i of the concepts (differences of means, with their lengths) the dimensionality
is D_i = ‖W_i‖² / Σ_j(Ŵ_i·W_j)² (Elhage et al. 2022): 1 for what is orthogonal to all others, 1/2
for each of an antipodal pair. Random directions are nearly orthogonal where there are many
dimensions: their null is random directions of the same lengths.

Features are *computed* where they can be read linearly after the nonlinearity of an MLP and could
not, or less well, be before. Both are read by the same linear discriminant from the same neurons.
The candidates are the concepts, and of pairs of them the XOR, which no linear map of the two is.

What this does not show: that the model uses what can be read; that the features are its own, since
only the candidates are looked at; or that there are more features than neurons. That n neurons can
compute on the order of n²/log n features is a bound (Adler & Shavit 2024), and a number of
candidates far below the number of neurons is no evidence of superposition.

Shapes: `layer` what enters the first block and then what each returns; `concept` the directions;
`draw` of random ones; `candidate` what is read; `group` of sequences that are left out together.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from scipy.special import ndtr
from torch import Tensor

from monitor.claims import Estimate
from monitor.estimate import jackknife_stderr
from monitor.evidence import Evidence, unseen
from monitor.features.directions import METHODS, Directions
from monitor.features.readable import AFTER, BEFORE, LABELLED, SHUFFLED, Readable
from monitor.features.superposition import feature_dimensionality, square_cosines
from monitor.record import Dim, Field, ProbeSpec

_METHOD = METHODS.index("diff_in_means")

# Of the null's standard deviation they leave a sixteenth unknown.
_DRAWS = 128

# By how many standard deviations an area must rise, and lie above 1/2.
_BEYOND = 3.0

_ALONE = "tokens that have, or lack, a candidate are in so few sequences that none can be left out"

_OVERLAP = (
    "Labels that overlap (a capital often follows a space) make directions alike: that is in the "
    "text, and not in the model. "
)
_SHUFFLED = "the same with each candidate's labels shuffled"

SPEC = ProbeSpec(
    name="superposition",
    help="How the directions of concepts share the residual stream, and what can be read linearly "
    "after the nonlinearity of an MLP but not before it, from at most 256 of its neurons (of a "
    "gated one 128), drawn at random: the concepts and, of at most 10 pairs, whether just one of "
    "the two is there. Before the first block there is no MLP. What cannot be told is missing, and "
    "`missing` says why.",
    source="Elhage et al. 2022; Hänni et al. 2024; Adler & Shavit 2024",
    dims=(
        Dim(
            name="layer",
            help="Transformer block after which directions are looked at, and whose MLP is; -1: "
            "before the first one.",
        ),
    ),
    fields=(
        Field(
            name="dimensionality",
            help="Mean over concepts of D = ‖W_i‖² / Σ_j(Ŵ_i·W_j)², the share of a dimension that "
            "a concept's direction has. The stderr is a bound, from the two halves of the "
            "sequences.",
            low=0,
            high=1,
            null="random directions of the same number, lengths and dimensions",
            null_sd=True,
            fooled_by=_OVERLAP + "What all directions share, of a few large dimensions say, lowers "
            "it; noise from few tokens raises it. Weak directions beside strong ones have less.",
        ),
        Field(
            name="interference",
            help="Mean squared cosine between the directions of different concepts. The stderr is "
            "a bound, from the two halves of the sequences.",
            low=0,
            high=1,
            null="1 over the number of dimensions: random directions",
            null_sd=True,
            fooled_by=_OVERLAP + "Antipodal directions have as much as equal ones.",
        ),
        Field(
            name="readable_before",
            help="Mean over candidates of the held-out area under the ROC curve of a linear "
            "discriminant on pre-activations (in a gated MLP, gates and what they gate).",
            low=0,
            high=1,
            null=_SHUFFLED,
            fooled_by="What depends on the token alone can often be read from the embedding.",
        ),
        Field(
            name="readable_after",
            help="Mean over candidates of the held-out area under the ROC curve of the same "
            "discriminant on the post-activations of the same neurons.",
            low=0,
            high=1,
            null=_SHUFFLED,
            fooled_by="Compare it with what was readable before. A random layer makes XORs "
            "readable too: compare it with the first measurement. Features that need more neurons "
            "than were looked at are missed.",
        ),
        Field(
            name="computed",
            help="Share of the candidates whose area rises from before to after by more than 3 "
            "standard deviations, to more than 3 above 1/2; at most on the order of n²/log n "
            "features can be computed by n neurons.",
            low=0,
            high=1,
            stderr=False,
            null=_SHUFFLED + "; its null_sd is that of as many candidates that pass at the rate "
            "of shuffled ones in all layers, at least that of 3 deviations",
            null_sd=True,
            fooled_by="What is only sharpened by the nonlinearity counts too. A random layer "
            "computes some XORs: compare it with the first measurement. The deviations are those "
            "of scoring, and know nothing of noise in what was fitted. Candidates are not "
            "independent, and only what was labelled is one.",
        ),
        Field(
            name="carried_by",
            help="Neurons that carry what is computed: participation ratio (Σw²)²/Σw⁴ of the "
            "discriminant's weights on post-activations, in units of their standard deviation, "
            "the mean over the candidates that count as computed; missing where none does.",
            low=0,
            stderr=False,
            null="all candidates with their labels shuffled: weights of noise, on about a third of "
            "the neurons",
            null_sd=True,
            fooled_by="It counts among the neurons that were looked at. Noise in the weights "
            "raises it, and neurons that are alike share a weight arbitrarily.",
        ),
        Field(
            name="computed_names",
            help="The candidates that count as computed.",
            text=True,
            stderr=False,
        ),
        Field(
            name="missing",
            help="Why fields are missing; empty where none is.",
            text=True,
            stderr=False,
        ),
    ),
    needs=(("concepts", "directions"), ("concepts", "readable")),
)

_NUMBERS = tuple(column for f in SPEC.fields if f.is_number for column in f.columns)


def compute(evidence: Evidence) -> dict[str, Any]:
    """One row for what enters the first block and one a block, as far as either was seen."""
    directions, no_directions = evidence.collected("directions")
    readable, not_read = evidence.collected("readable")
    if directions is None and readable is None:
        same = no_directions == not_read
        return unseen(SPEC, no_directions if same else f"{no_directions}; {not_read}")
    sharing = {} if directions is None else _sharing(directions)
    reading: dict[int, dict[str, Any]] = {} if readable is None else _reading(readable)
    whys = {} if readable is None else dict.fromkeys(readable.layers, _ALONE) | readable.reasons
    whys[-1] = "no MLP comes before the first block"
    labels = evidence.observations["concepts"].stimulus.labels
    sources = 0 if labels is None else len(labels.source.unique())
    rows = []
    for layer in sorted({*sharing, *reading, *whys}):
        told, why = sharing.get(layer, (None, no_directions))
        read = reading.get(layer)
        why_not = "" if read is not None else whys.get(layer, not_read)
        reasons = "; ".join(each for each in (why, why_not) if each)
        row: dict[str, Any] = dict.fromkeys(_NUMBERS) | {"computed_names": ""}
        row |= (told or {}) | (read or {})
        row |= {"layer": layer, "n": sources, "missing": reasons}
        rows.append(row | {"validity": reasons if told is None and read is None else "ok"})
    return {column: [row[column] for row in rows] for column in rows[0]}


def _sharing(directions: Directions) -> dict[int, tuple[dict[str, float] | None, str]]:
    """By layer its columns and nothing, or None and why there are none."""
    vectors = directions.vectors[:, :, _METHOD]
    halves = directions.halves[:, :, :, _METHOD]
    told: dict[int, tuple[dict[str, float] | None, str]] = {}
    random = _random_square_cosines(vectors.shape[1], vectors.shape[2])
    for place, layer in enumerate(directions.layers):
        known = (vectors[place].isfinite().all(-1)) & halves[:, place].isfinite().all(-1).all(0)
        own, half = vectors[place, known], halves[:, place, known]
        if len(own) < 2:
            told[layer] = None, f"directions of {len(own)} concepts: two are needed to share"
            continue
        told[layer] = _shared(own, half, random[:, : len(own), : len(own)]), ""
    return told


def _shared(
    own: Float[Tensor, "concept feature"],
    halves: Float[Tensor, "half concept feature"],
    random: Float[Tensor, "draw concept concept"],
) -> dict[str, float]:
    count, dimensions = own.shape
    squares = own.double().square().sum(-1)
    # (Ŵ_i·W_j)² of random directions that are as long.
    nulls = (squares / (random * squares).sum(-1)).where(squares > 0, 0.0).mean(-1)
    pairs = count * (count - 1) / 2
    spread = math.sqrt(2 * (dimensions - 1) / (dimensions**2 * (dimensions + 2)) / pairs)
    columns = _half_apart(
        "dimensionality", feature_dimensionality(own), feature_dimensionality(halves)
    )
    columns |= _half_apart("interference", square_cosines(own), square_cosines(halves))
    return columns | {
        "dimensionality_null": float(nulls.mean()),
        "dimensionality_null_sd": float(nulls.std()),
        "interference_null": 1 / dimensions,
        "interference_null_sd": spread,
    }


def _half_apart(
    field: str, own: Float[Tensor, " concept"], halves: Float[Tensor, "half concept"]
) -> dict[str, float]:
    """Mean over concepts. A concept's standard deviation is half the difference of the two halves,
    and that of the mean is at most their root mean square, however concepts depend on each other.
    """
    apart = (halves[0] - halves[1]) / 2
    return {field: float(own.mean()), f"{field}_stderr": float(apart.square().mean().sqrt())}


def _random_square_cosines(count: int, dimensions: int) -> Float[Tensor, "draw concept concept"]:
    """Between random directions, of each with itself 1. It is the same at every measurement."""
    random, cosines = torch.Generator().manual_seed(0), []
    for _ in range(_DRAWS):
        drawn = torch.randn(count, dimensions, generator=random)
        drawn /= drawn.norm(dim=-1, keepdim=True)
        cosines.append((drawn @ drawn.mT).double().square())
    return torch.stack(cosines)


def _reading(readable: Readable) -> dict[int, dict[str, Any]]:
    """By layer its columns."""
    whole, without = readable.areas, readable.without
    # What has tokens of both sides in so few sequences that they can be left out together.
    told = (whole.isfinite() & without.isfinite().all(-1)).all(-1).all(1).all(0)
    if not told.any():
        return {}
    whole, without, used = whole[:, :, told], without[:, :, told], readable.used[:, :, told]
    names = [name for name, kept in zip(readable.candidates, told.tolist(), strict=True) if kept]
    passed = _computed(whole, without)
    by_chance = max(float(passed[:, SHUFFLED].double().mean()), float(ndtr(-_BEYOND)))
    shares, by_noise = passed.double().mean(-1), used[:, SHUFFLED].mean(-1)
    # One layer alone may have too few candidates to tell how far noise scatters.
    apart = (used[:, SHUFFLED] - by_noise[:, None]).square().sum()
    scatter = float((apart / max(1, used[:, SHUFFLED].numel() - len(used))).sqrt())
    mean, mean_without = whole.mean(2), without.mean(2)
    rows = {}
    for place, layer in enumerate(readable.layers):
        here = passed[place, LABELLED]
        row: dict[str, Any] = {
            "computed": float(shares[place, LABELLED]),
            "computed_null": float(shares[place, SHUFFLED]),
            "computed_null_sd": math.sqrt(by_chance * (1 - by_chance) / len(names)),
            "computed_names": ", ".join(itertools.compress(names, here.tolist())),
        }
        if here.any() and len(names) > 1:
            row["carried_by"] = float(used[place, LABELLED, here].mean())
            row["carried_by_null"] = float(by_noise[place])
            row["carried_by_null_sd"] = scatter / math.sqrt(int(here.sum()))
        for field, stage in (("readable_before", BEFORE), ("readable_after", AFTER)):
            row[field] = float(mean[place, LABELLED, stage])
            row[f"{field}_stderr"] = float(jackknife_stderr(mean_without[place, LABELLED, stage]))
            row[f"{field}_null"] = float(mean[place, SHUFFLED, stage])
        rows[layer] = row
    return rows


def _computed(
    whole: Float[Tensor, "layer 2 candidate stage"],
    without: Float[Tensor, "layer 2 candidate stage group"],
) -> Bool[Tensor, "layer 2 candidate"]:
    """Which candidates are read better after than before, and better than by chance."""
    gain = whole[..., AFTER] - whole[..., BEFORE]
    return _beyond(gain, without[..., AFTER, :] - without[..., BEFORE, :]) & _beyond(
        whole[..., AFTER] - 0.5, without[..., AFTER, :]
    )


def _beyond(
    value: Float[Tensor, "*estimated"], without: Float[Tensor, "*estimated group"]
) -> Bool[Tensor, "*estimated"]:
    """What lies above 0 by more than `_BEYOND` standard deviations."""
    stderr, groups = jackknife_stderr(without.movedim(-1, 0)), without.shape[-1]
    beyond = [
        Estimate(value=one, null=0.0, stderr=error, n=groups).beyond(_BEYOND)
        for one, error in zip(value.flatten().tolist(), stderr.flatten().tolist(), strict=True)
    ]
    return torch.tensor(beyond).reshape(value.shape)
