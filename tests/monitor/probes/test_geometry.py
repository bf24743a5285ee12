"""`geometry`: angles that were planted in directions and in a model, against slow versions; its
errors against repeated draws; concepts that lie alike because their labels do; random labels.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe_features
from monitor.evidence import Evidence
from monitor.features import Directions
from monitor.labels import Labels
from monitor.parts import find_parts
from monitor.probes import geometry
from monitor.record import Moment, Reading
from monitor.stimuli import labelled_stimulus
from tests.models.planted_words import model_of
from tests.oracles import geometry as oracle

FEATURES = 48
NAMES = ("one", "two", "three", "four")


def random_labels(names=NAMES, *, batch=24, positions=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (len(names), batch, positions)
    values = (torch.randint(0, 2, shape, generator=random) * 2 - 1).to(torch.int8)
    return Labels(
        names=tuple(names),
        values=values,
        split=torch.arange(batch) % 3,
        length=torch.full((batch,), positions),
        source=torch.arange(batch),
    )


def directions(halves, *, metric=None, names=NAMES, tokens=99, dimensions=FEATURES):
    """Directions of one layer, from what was found on two halves [half, concept, feature]."""
    metric = torch.eye(halves.shape[-1]).double() if metric is None else metric
    halves = halves.double()
    of_method = torch.stack([halves, halves @ metric, halves], dim=2).float()
    return Directions(
        layers=(3,),
        names=tuple(names),
        vectors=of_method.mean(0)[None],
        thresholds=torch.zeros(1, len(names), 3),
        halves=of_method[:, None],
        counts=None,
        dimensions=torch.full((1, 3), float(dimensions)),
        tokens=torch.full((3, len(names), 2), tokens),
        controlled=torch.ones(len(names), dtype=torch.bool),
        sources=torch.full((len(names),), 12),
    )


def table(found, labels=None):
    labels = labels or random_labels(found.names)
    stimulus = labelled_stimulus("concepts", torch.zeros(labels.values.shape[1:]).long(), labels)
    observation = Observation(stimulus=stimulus, vocab_size=9, features={"directions": found})
    return geometry.compute(Evidence(observations={"concepts": observation}))


def rows_of(columns):
    return {
        (one, other): {name: values[number] for name, values in columns.items()}
        for number, (one, other) in enumerate(
            zip(columns["concept"], columns["other"], strict=True)
        )
    }


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_angles_are_those_of_vectors_taken_one_by_one():
    root = noise(FEATURES, FEATURES, seed=1)
    metric = (root @ root.T / FEATURES + torch.eye(FEATURES)).double()
    halves = noise(1, 4, FEATURES) + 0.3 * noise(2, 4, FEATURES, seed=2)
    columns = table(directions(halves, metric=metric.double()))
    assert set(columns["layer"]) == {3}
    rows = rows_of(columns)
    assert len(rows) == 6
    mean = halves.mean(0).numpy()
    for (one, other), found in rows.items():
        i, j = NAMES.index(one), NAMES.index(other)
        cosine = oracle.cosine(mean[i], mean[j])
        assert found["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert found["interference"] == abs(found["cosine"])
        whitened = oracle.cosine(mean[i], mean[j], metric.numpy())
        assert found["cosine_whitened"] == pytest.approx(whitened, abs=1e-6)
        first, second = halves.numpy()
        across = (first[i] @ second[j] + second[i] @ first[j]) / 2
        alike = math.sqrt((first[i] @ second[i]) * (first[j] @ second[j]))
        assert found["cosine_disattenuated"] == pytest.approx(across / alike, abs=1e-5)
        assert found["validity"] == "ok"


@pytest.mark.parametrize("features", [3, 8, 64, 768])
def test_the_interference_of_random_directions_is_known(features):
    null = geometry._nulls(features)
    mean = null["interference_null"]
    assert mean == pytest.approx(oracle.mean_absolute_cosine(features), rel=1e-6)
    if features > 60:
        assert mean == pytest.approx(math.sqrt(2 / (math.pi * features)), rel=0.01)
    units = noise(400, features)
    units /= units.norm(dim=1, keepdim=True)
    cosines = (units @ units.T)[np.triu_indices(400, 1)]
    assert cosines.abs().mean() == pytest.approx(mean, rel=0.02)
    assert cosines.abs().std() == pytest.approx(null["interference_null_sd"], rel=0.02)
    assert cosines.std() == pytest.approx(null["cosine_whitened_null_sd"], rel=0.02)


@pytest.mark.parametrize("concepts", [2, 4])
@pytest.mark.parametrize("true", [0.0, 0.6, 0.95])
def test_errors_are_as_large_as_draws_scatter_and_noise_is_taken_out(concepts, true):
    names, draws = NAMES[:concepts], 150
    labels = random_labels(names)
    vectors = torch.linalg.qr(noise(FEATURES, concepts))[0].T
    vectors[1] = true * vectors[0] + math.sqrt(1 - true**2) * vectors[1]
    seen = {"cosine": [], "cosine_disattenuated": [], "cosine_whitened": []}
    errors = {name: [] for name in seen}
    for seed in range(draws):
        halves = vectors + 0.12 * noise(2, concepts, FEATURES, seed=10 + seed)
        row = rows_of(table(directions(halves, names=names), labels))["one", "two"]
        for name, values in seen.items():
            values.append(row[name])
            errors[name].append(row[f"{name}_stderr"])
    for name, values in seen.items():
        spread = np.std(values)
        # Of directions that are nearly one it is rather too large.
        assert 0.75 < np.sqrt(np.mean(np.square(errors[name]))) / spread < 1.45, name
    # Noise of |ε|² = 48 · 0.12² / 2 beside directions of length 1.
    left = 1 / (1 + FEATURES * 0.12**2 / 2)
    tolerance = 4 * np.std(seen["cosine_disattenuated"]) / math.sqrt(draws)
    assert np.mean(seen["cosine"]) == pytest.approx(true * left, abs=tolerance)
    assert np.mean(seen["cosine_disattenuated"]) == pytest.approx(true, abs=tolerance + 0.01)


def test_concepts_that_the_same_tokens_have_are_told_from_those_that_lie_alike():
    labels = random_labels()
    values = labels.values.clone()
    values[1] = values[0]
    values[2] = -values[0]
    values[3, :, ::2] = 0
    same = dataclasses.replace(labels, values=values)
    rows = rows_of(table(directions(noise(1, 4, FEATURES).expand(2, -1, -1)), same))
    assert rows["one", "two"]["label_overlap"] == pytest.approx(1)
    assert rows["one", "three"]["label_overlap"] == pytest.approx(-1)
    apart = rows["one", "four"]
    used = same.used
    expected = oracle.phi(values[0][used].tolist(), values[3][used].tolist())
    assert apart["label_overlap"] == pytest.approx(expected)
    assert abs(expected) < 3 * apart["label_overlap_stderr"]
    # About 1 / √(tokens) for independent labels.
    tokens = int((values[3][used] != 0).sum())
    assert apart["label_overlap_stderr"] == pytest.approx(tokens**-0.5, rel=0.6)


def test_labels_without_tokens_in_common_have_no_overlap_to_tell():
    labels = random_labels()
    values = labels.values.clone()
    values[0, :, 1::2], values[1, :, ::2] = 0, 0
    apart = dataclasses.replace(labels, values=values)
    row = rows_of(table(directions(noise(1, 4, FEATURES).expand(2, -1, -1)), apart))["one", "two"]
    assert row["label_overlap"] is None
    assert row["validity"] == "ok"


def test_where_nothing_is_to_tell_the_row_says_why():
    found = directions(noise(2, 4, FEATURES), tokens=3)
    columns = table(found)
    assert columns["validity"] == [
        f"too few tokens of {name!r}: 8 of a side are needed"
        for name in ("one", "one", "one", "two", "two", "three")
    ]
    assert set(columns["cosine"]) == {None}
    only = table(directions(noise(2, 1, FEATURES), names=["one"]), random_labels(["one"]))
    assert only["validity"] == ["only 'one' was given: pass another"]
    none = table(directions(noise(2, 0, FEATURES), names=[]), random_labels([]))
    assert none["validity"] == ["no concepts were given: pass concepts="]
    nothing = geometry.compute(Evidence(observations={}))
    assert nothing["validity"] == ["there is nothing to look at: pass text= or concepts="]


def test_a_stream_of_zeros_is_not_interpretable_and_halves_that_disagree_leave_one_field_out():
    when = Moment(run="r", attempt=1, step=0, tokens=None, time=None)
    zeros = table(directions(torch.zeros(2, 4, FEATURES), dimensions=float("nan")))
    stored = Reading.build(geometry.SPEC, when, zeros).table
    assert set(stored["validity"].to_pylist()) == {"cosine is not finite"}
    opposite = noise(1, 4, FEATURES) * torch.tensor([1.0, -0.9]).double()[:, None, None]
    stored = Reading.build(geometry.SPEC, when, table(directions(opposite))).table
    assert set(stored["validity"].to_pylist()) == {"ok"}
    assert stored["cosine_disattenuated"].null_count == 6
    assert stored["cosine"].null_count == 0


def measured(vectors, labels_of, *, batch=96, seed=0):
    """The table of a model that embeds word i + 1 as the vector i, on random words."""
    model = find_language_model(model_of(vectors))
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 1 + len(vectors), (batch, 24), generator=random)
    values = torch.stack([torch.where(has(tokens), 1, -1) for has in labels_of.values()])
    labels = Labels(
        names=tuple(labels_of),
        values=values.to(torch.int8),
        split=torch.tensor([0, 1, 2, 2]).repeat(batch // 4),
        length=torch.full((batch,), 24),
        source=torch.arange(batch),
    )
    stimulus = labelled_stimulus("concepts", tokens, labels)
    seen = observe_features(find_parts(model), stimulus, ["directions"])
    assert seen.reasons == {}
    return geometry.compute(Evidence(observations={"concepts": seen}))


def features_of_words(wide):
    """A model's words have or lack each of three features, two of them 60° apart; the fourth label
    is of nothing. They scatter along one more direction, by chance more to one side of each label.
    """
    first, second, third, beside = torch.linalg.qr(noise(64, 4))[0].T.float()
    second = 0.5 * first + math.sqrt(0.75) * second
    bits = torch.tensor([[word >> place & 1 for place in range(4)] for word in range(16)] * 3)
    planted = (bits[:, :3] * 2 - 1).float() @ torch.stack([first, second, third])
    scatter = 0.02 * noise(48, 64, seed=3).float() + wide * noise(48, 1, seed=4).float() * beside
    labels_of = {
        name: lambda tokens, place=place: bits[tokens - 1, place] == 1
        for place, name in enumerate(NAMES)
    }
    columns = measured(planted + scatter, labels_of)
    assert columns["layer"] == [layer for layer in (-1, 0, 1) for _ in range(6)]
    assert set(columns["validity"]) == {"ok"}
    return rows_of({name: values[:6] for name, values in columns.items()})


def test_angles_planted_in_an_embedding_come_out_of_the_model():
    rows = features_of_words(wide=0.0)
    for pair, planted in {("one", "two"): 0.5, ("one", "three"): 0, ("two", "three"): 0}.items():
        for name in ("cosine", "cosine_disattenuated"):
            # Two labels of 1100 random tokens are correlated by about 0.03, which turns both.
            assert rows[pair][name] == pytest.approx(planted, abs=0.2), name
            assert 0.005 < rows[pair][f"{name}_stderr"] < 0.1


def test_a_direction_of_large_values_brings_all_together_but_not_beyond_the_null_nor_whitened():
    for found in features_of_words(wide=8.0).values():
        assert abs(found["cosine"]) > 3 * found["cosine_whitened_null_sd"]
        assert abs(found["cosine"]) < 3 * found["cosine_null_sd"]
        assert abs(found["cosine_whitened"]) < 0.25
