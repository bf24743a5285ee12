"""How concept directions share the stream, beside random directions, and what counts as computed:
against numbers written out, where the answer was planted, and where there is nothing.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.capture import Observation
from monitor.claims import Estimate, rows
from monitor.evidence import Evidence
from monitor.features import COLLECTORS, collect
from monitor.features.directions import METHODS, Directions
from monitor.features.readable import Readable
from monitor.parts import find_parts
from monitor.probes.superposition import SPEC, compute
from monitor.stimuli import Stimulus
from tests.models import AttentionOnly
from tests.models.toy_superposition import PlantedXor
from tests.monitor.features.test_readable import labelled, parity
from tests.monitor.features.test_superposition import polygon, written_out

WHY_NOT = "no concepts were given: pass concepts="


def directions(own: Tensor, halves: Tensor | None = None) -> Directions:
    """Diff-in-means directions [layer concept feature] from layer -1 on; other methods' are not
    asked for.
    """
    halves = own.expand(2, *own.shape) if halves is None else halves
    layers, concepts, _ = own.shape
    other = torch.full_like(own, math.nan)
    return Directions(
        layers=tuple(range(-1, layers - 1)),
        names=tuple(f"c{i}" for i in range(concepts)),
        vectors=torch.stack([own, other, other], dim=2),
        halves=torch.stack([halves, *[torch.full_like(halves, math.nan)] * 2], dim=3),
        thresholds=torch.zeros(layers, concepts, len(METHODS)),
        counts=None,
        dimensions=torch.ones(layers, len(METHODS)),
        tokens=torch.full((3, concepts, 2), 100),
        controlled=torch.ones(concepts, dtype=torch.bool),
        sources=torch.full((concepts,), 16),
    )


def seen(model: nn.Module | None, stimulus: Stimulus, told: Directions | None = None) -> Evidence:
    features: dict[str, Any] = {} if told is None else {"directions": told}
    reasons = {} if told is not None else {"directions": WHY_NOT}
    if model is None:
        reasons["readable"] = "not asked for"
    else:
        parts = find_parts(find_language_model(model))
        kinds = {"readable": COLLECTORS["readable"]}
        collected, why = collect(parts, stimulus, kinds)
        features, reasons = features | collected, reasons | why
    observation = Observation(stimulus=stimulus, vocab_size=64, features=features, reasons=reasons)
    return Evidence(observations={"concepts": observation})


def table(evidence: Evidence) -> dict[int, dict[str, Any]]:
    """The rows by layer; every one has every declared column."""
    columns = compute(evidence)
    declared = {column for field in SPEC.fields for column in field.columns}
    assert columns.keys() == {"layer", "n", "validity", *declared}
    return {row["layer"]: row for row in rows(columns)}


def of_directions(own: Tensor, halves: Tensor | None = None) -> dict[int, dict[str, Any]]:
    return table(seen(None, labelled(), directions(own, halves)))


def estimate(row: dict[str, Any], field: str) -> Estimate:
    told = Estimate.of(row, field)
    assert told is not None
    return told


def test_planted_directions_have_the_share_of_their_polytope():
    five = torch.zeros(5, 6)
    five[:, :2] = polygon(5)
    told = of_directions(torch.stack([five, torch.eye(5, 6)]))
    assert told[-1]["dimensionality"] == pytest.approx(0.4)
    assert told[-1]["interference"] == pytest.approx((2.5 - 1) / 4)
    assert told[0]["dimensionality"] == pytest.approx(1.0)
    assert told[0]["interference"] == 0.0
    for row in told.values():
        assert row["validity"] == "ok"
        assert row["dimensionality_stderr"] == row["interference_stderr"] == 0.0


def test_means_are_those_written_out():
    random = torch.Generator().manual_seed(0)
    own = torch.randn(3, 5, 8, generator=random) * torch.rand(3, 5, 1, generator=random)
    halves = own + 0.1 * torch.randn(2, 3, 5, 8, generator=random)
    told = of_directions(own, halves)
    for place, layer in enumerate((-1, 0, 1)):
        share, _, cosines = torch.tensor(written_out(own[place])).T
        assert told[layer]["dimensionality"] == pytest.approx(float(share.mean()))
        assert told[layer]["interference"] == pytest.approx(float(cosines.mean()))
        first, second = (torch.tensor(written_out(half[place])) for half in halves)
        apart = ((first - second) / 2).square().mean(0).sqrt()
        assert told[layer]["dimensionality_stderr"] == pytest.approx(float(apart[0]), rel=1e-4)
        assert told[layer]["interference_stderr"] == pytest.approx(float(apart[2]), rel=1e-4)


def test_the_nulls_are_what_random_directions_of_those_lengths_have():
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([0.2, 1.0, 1.0, 3.0])[:, None]
    own = torch.randn(4, 8, generator=random)
    row = of_directions((lengths * own / own.norm(dim=-1, keepdim=True))[None])[-1]
    drawn = torch.randn(2000, 4, 8, generator=random)
    drawn = lengths * drawn / drawn.norm(dim=-1, keepdim=True)
    shares, cosines = [], []
    for one in drawn:
        told = torch.tensor(written_out(one))
        shares.append(float(told[:, 0].mean()))
        cosines.append(float(told[:, 2].mean()))
    for field, values in (("dimensionality", shares), ("interference", cosines)):
        known = torch.tensor(values)
        sd = float(known.std())
        assert row[f"{field}_null"] == pytest.approx(float(known.mean()), abs=sd / 3)
        assert row[f"{field}_null_sd"] == pytest.approx(sd, rel=0.25)
    assert row["interference_null"] == 1 / 8


def test_random_directions_are_not_beyond_their_null():
    """The impostor: many directions in few dimensions interfere, as random ones do."""
    random = torch.Generator().manual_seed(2)
    told = of_directions(torch.randn(40, 12, 16, generator=random))
    for field in ("dimensionality", "interference"):
        away = torch.tensor(
            [(row[field] - row[f"{field}_null"]) / row[f"{field}_null_sd"] for row in told.values()]
        )
        assert away.abs().max() < 4
        assert away.std() == pytest.approx(1.0, abs=0.35)


def test_directions_that_share_a_dimension_are_beyond_it():
    random = torch.Generator().manual_seed(3)
    own = torch.randn(1, 8, 64, generator=random)
    own[..., 0] += 6.0
    row = of_directions(own)[-1]
    assert estimate(row, "interference").beyond(3.0)
    assert estimate(row, "dimensionality").beyond(3.0, below=True)


@pytest.mark.parametrize("together", [False, True])
def test_the_stderr_is_a_bound_on_how_far_noise_moves_the_means(together):
    """Noise of each concept's own, and noise that all of them have in common."""
    random = torch.Generator().manual_seed(4)
    true = torch.randn(6, 12, generator=random)
    noise = 0.15 * torch.randn(2, 400, 1 if together else 6, 12, generator=random)
    noise = noise.expand(2, 400, 6, 12) * 2**0.5
    told = of_directions(true + noise.mean(0), true + noise)
    for field in ("dimensionality", "interference"):
        values = torch.tensor([row[field] for row in told.values()])
        squares = torch.tensor([row[f"{field}_stderr"] for row in told.values()]).square()
        ratio = float(squares.mean().sqrt() / values.std())
        assert 0.9 < ratio < 6**0.5 * 1.3, (field, ratio)


def test_concepts_without_directions_are_left_out():
    own = torch.eye(4).expand(2, 4, 4).clone()
    own[:, 3] = math.nan
    own[1, 1:] = math.nan
    told = of_directions(own)
    assert told[-1]["dimensionality"] == 1.0
    assert told[0]["dimensionality"] is None
    assert "directions of 1 concepts: two are needed" in told[0]["validity"]


def test_only_the_planted_xor_is_computed():
    told = table(seen(PlantedXor(), labelled(), directions(torch.eye(3).expand(3, 3, 3))))
    assert list(told) == [-1, 0, 1]
    assert {row["validity"] for row in told.values()} == {"ok"}
    planted, other = told[0], told[1]
    assert planted["computed_names"] == "a xor b"
    assert planted["computed"] == pytest.approx(1 / 6)
    assert estimate(planted, "computed").beyond(3.0)
    assert planted["computed_null"] == 0.0
    assert planted["carried_by"] == pytest.approx(2.0, abs=0.1)
    assert planted["missing"] == ""
    gain = planted["readable_after"] - planted["readable_before"]
    assert gain > 3 * (planted["readable_after_stderr"] + planted["readable_before_stderr"])
    for field in ("readable_before", "readable_after"):
        assert estimate(planted, field).beyond(3.0)
        assert not estimate(other, field).beyond(3.0)
        assert planted[f"{field}_null"] == pytest.approx(0.5, abs=0.03)
    assert other["computed"] == 0.0
    assert other["computed_names"] == ""
    assert other["carried_by"] is None
    assert told[-1]["readable_after"] is None
    assert told[-1]["missing"] == "no MLP comes before the first block"


@pytest.mark.parametrize(
    ("activation", "written"),
    [(lambda x: x, False), (lambda x: 3.0 - 2.0 * x, False), (torch.relu, True)],
    ids=["identity", "affine", "written"],
)
def test_what_was_readable_before_is_not_computed(activation, written):
    told = table(seen(PlantedXor(activation, written=written), labelled()))
    assert all(told[layer]["computed"] == 0.0 for layer in (0, 1))
    assert estimate(told[0], "readable_after").beyond(3.0)


def of_areas(each: Tensor) -> dict[int, dict[str, Any]]:
    """Rows from areas of each group of sequences, [layer 2 candidate stage group]."""
    layers, _, count, _, groups = each.shape
    readable = Readable(
        layers=tuple(range(layers)),
        candidates=tuple(f"c{i}" for i in range(count)),
        neurons=(24,) * layers,
        areas=each.mean(-1),
        without=(each.sum(-1, keepdim=True) - each) / (groups - 1),
        used=torch.full((layers, 2, count), 8.0),
        reasons={},
    )
    observation = Observation(
        stimulus=labelled(), vocab_size=64, features={"readable": readable}, reasons={}
    )
    return table(Evidence(observations={"concepts": observation}))


def test_what_is_computed_by_chance_is_as_rare_as_three_deviations():
    """Areas that differ by noise alone, with the noise of their groups of sequences."""
    random = torch.Generator().manual_seed(5)
    told = of_areas(0.5 + 0.05 * torch.randn(100, 2, 20, 2, 16, generator=random))
    shares = torch.tensor([told[layer]["computed"] for layer in range(100)])
    assert float(shares.mean()) < 0.003
    assert told[0]["computed_null_sd"] == pytest.approx(math.sqrt(0.00135 / 20), rel=0.5)


@pytest.mark.parametrize(
    ("before", "after", "computed"), [(0.3, 0.5, 0.0), (0.7, 0.7, 0.0), (0.5, 0.7, 1.0)]
)
def test_computed_is_what_rises_and_is_readable(before, after, computed):
    random = torch.Generator().manual_seed(6)
    areas = torch.tensor([before, after])[:, None].expand(1, 2, 4, 2, 16)
    told = of_areas(areas + 0.01 * torch.randn(1, 2, 4, 2, 16, generator=random))
    assert told[0]["computed"] == computed
    assert told[0]["readable_after"] == pytest.approx(after, abs=0.01)


def test_a_candidate_that_few_sequences_have_is_left_out():
    evidence = seen(PlantedXor(), labelled())
    whole = table(evidence)[0]
    readable: Readable = evidence.observations["concepts"].features["readable"]
    readable.without[1, 0, 0, 1, 2] = math.nan
    fewer = table(evidence)[0]
    assert whole["computed"] == pytest.approx(1 / 6)
    assert fewer["computed"] == pytest.approx(1 / 5)
    readable.without[:] = math.nan
    told = table(evidence)
    assert "can be left out" in told[0]["validity"]


def test_without_an_mlp_it_tells_what_it_can():
    own = torch.eye(4).expand(3, 4, 4)
    stimulus = labelled(vocabulary=find_language_model(AttentionOnly()).vocab_size, of=parity)
    told = table(seen(AttentionOnly(), stimulus, directions(own)))
    for layer, row in told.items():
        assert row["validity"] == "ok"
        assert row["dimensionality"] == 1.0
        assert row["readable_before"] is None
        assert row["missing"].startswith("no MLP comes" if layer == -1 else "MLP: ")


def test_without_anything_its_one_row_says_why():
    (row,) = table(Evidence(observations={})).values()
    assert row["validity"] == "there is nothing to look at: pass text= or concepts="
    stimulus = labelled()
    reasons = {"directions": WHY_NOT, "readable": WHY_NOT}
    nothing = Observation(stimulus=stimulus, vocab_size=64, features={}, reasons=reasons)
    (row,) = table(Evidence(observations={"concepts": nothing})).values()
    assert row["validity"] == WHY_NOT


def test_it_can_be_said_twice():
    evidence = seen(PlantedXor(), labelled(), directions(torch.eye(3).expand(3, 3, 3)))
    again = seen(PlantedXor(), labelled(), directions(torch.eye(3).expand(3, 3, 3)))
    assert compute(evidence) == compute(again)
