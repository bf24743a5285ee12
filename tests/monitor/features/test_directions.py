"""Directions of a concept that was planted along one: found by every method, as sure as is said, in
passes cut anywhere, and of labels that mean nothing none.
"""

import dataclasses
import math

import pytest
import torch
from scipy.special import ndtr
from sklearn import metrics

from monitor.anatomy import find_language_model
from monitor.features import METHODS, collect, collecting
from monitor.features.directions import DirectionsCollector
from monitor.features.scores import accuracy, auc, selectivity
from monitor.features.tasks import control_labels
from monitor.labels import EVALUATION, FEWEST
from monitor.parts import activations, find_parts
from tests.models.planted_direction import PlantedDirection, found, labelled

EVEN, POSITION, ID = range(3)


@pytest.fixture(scope="module")
def parts():
    return find_parts(find_language_model(PlantedDirection(strength=1.5, mean=50.0)))


@pytest.fixture(scope="module")
def stimulus():
    return labelled(rows=48)


@pytest.fixture(scope="module")
def told(parts, stimulus):
    collected, reasons = collect(parts, stimulus, {"directions": DirectionsCollector})
    assert reasons == {}
    return collected["directions"]


def test_the_planted_direction_is_found_with_the_area_that_it_must_have(told):
    planted = PlantedDirection().planted
    assert told.layers == (-1, 0)
    assert told.names == ("even", "position", "id")
    areas, errors = auc(told.counts[:, EVEN, :, 0])
    # With 384 tokens to fit on, noise takes a little of it away.
    assert ((areas - ndtr(1.5 / math.sqrt(2))).abs() < 3 * errors + 0.015).all()
    cosines = torch.cosine_similarity(told.vectors[:, EVEN], planted, dim=-1)
    assert (cosines > 0.9).all()
    assert told.vectors[0, EVEN, 0].norm().item() == pytest.approx(1.5, abs=0.3)


def test_impostors_are_readable_by_heart_or_not_at_all(told):
    """A side for every token on its own is chance; one for every id is no concept."""
    areas, errors = auc(told.counts[:, POSITION, :, 0])
    assert ((areas - 0.5).abs() < 4 * errors).all()
    assert (told.split_half[:, POSITION].abs() < 4 * told.dimensions**-0.5).all()
    ahead, errors = selectivity(told.counts)
    assert (ahead[:, EVEN] > 5 * errors[:, EVEN]).all()
    assert (ahead[:, [POSITION, ID]].abs() < 4 * errors[:, [POSITION, ID]]).all()


def test_impostor_few_token_ids_are_known_by_heart():
    """Eight ids in 24 dimensions: whatever side they are on can be read, and means nothing."""
    few = found(PlantedDirection(strength=0.0, vocab_size=8), labelled(vocab_size=8, rows=64))
    areas, _ = auc(few.counts[0, ID, :, 0])
    assert (areas > 0.95).all()
    ahead, errors = selectivity(few.counts)
    assert (ahead[0, ID] < 0.1 + 4 * errors[0, ID]).all()


def test_means_and_counts_written_out(parts, stimulus, told):
    """The differences of means, and what scores say, from all activations at once."""
    stream = activations(parts, stimulus.tokens, sites=["residual_before", "residual_after"])
    labels = stimulus.labels
    tasks = torch.stack([labels.values, control_labels(stimulus)], dim=1)
    fitted = labels.split != EVALUATION
    for place, rows in enumerate((stream["residual_before", 0], stream["residual_after", 0])):
        for concept in range(3):
            for half in (0, 1):
                here = labels.split == half
                having = rows[here][labels.values[concept, here] > 0].double().mean(0)
                lacking = rows[here][labels.values[concept, here] < 0].double().mean(0)
                torch.testing.assert_close(
                    told.halves[half, place, concept, 0],
                    (having - lacking).float(),
                    atol=1e-4,
                    rtol=1e-4,
                )
            counts = labels.values[concept] != 0
            evaluated = rows[(~fitted)[:, None] & counts]
            for method in range(3):
                vector = told.vectors[place, concept, method]
                threshold = told.thresholds[place, concept, method]
                scores = (evaluated.double() @ vector.double()).numpy()
                truth = tasks[concept, 0][(~fitted)[:, None] & counts].numpy() > 0
                area, _ = auc(told.counts[place, concept, method, 0])
                expected = metrics.roc_auc_score(truth, scores)
                assert area.item() == pytest.approx(expected, abs=3e-3)
                right, _ = accuracy(told.counts[place, concept, method, 0])
                expected = metrics.balanced_accuracy_score(truth, scores > float(threshold))
                assert right.item() == pytest.approx(expected, abs=3e-3)


@pytest.mark.parametrize("at_once", [33, 200])
def test_passes_may_be_cut_anywhere(at_once, parts, stimulus, told, monkeypatch):
    monkeypatch.setattr(collecting, "_TOKENS", at_once)
    collected, _ = collect(parts, stimulus, {"directions": DirectionsCollector})
    again = collected["directions"]
    for own, other in zip(told.halves, again.halves, strict=True):
        assert (torch.cosine_similarity(own, other, dim=-1) > 0.9999).all()
    assert (torch.cosine_similarity(told.vectors, again.vectors, dim=-1) > 0.9999).all()
    # A token may lie on a threshold.
    for task in (0, 1):
        ours, theirs = (auc(each.counts[:, :, :, task])[0] for each in (told, again))
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_memory_does_not_grow_with_the_number_of_tokens(parts):
    def held(rows):
        collector = []

        def make(parts, stimulus):
            collector.append(DirectionsCollector(parts, stimulus))
            return collector[0]

        before_fit = []
        turn = DirectionsCollector.turn

        class Counting(DirectionsCollector):
            def turn(self, split):
                sums = [half for layer in self._layers.values() for half in layer.sums.values()]
                before_fit.append(sum(len(kept) for half in sums for kept in half.rows))
                turn(self, split)

        collect(parts, labelled(rows=rows), {"directions": Counting})
        return max(before_fit)

    # 1,024 tokens of each of two layers at most.
    assert held(40) == 2 * 640
    assert held(80) == held(160) == 2 * 1024


def test_a_rare_concept_is_not_crowded_out():
    stimulus = labelled(rows=240)
    values = stimulus.labels.values.clone()
    rare = values[EVEN].clone()
    # One token in fifty counts.
    rare.view(-1)[torch.arange(rare.numel()) % 50 != 7] = 0
    values[EVEN] = rare
    labels = dataclasses.replace(stimulus.labels, values=values)
    told = found(PlantedDirection(strength=4.0), dataclasses.replace(stimulus, labels=labels))
    planted = PlantedDirection().planted
    cosines = torch.cosine_similarity(told.vectors[0, EVEN], planted, dim=-1)
    # The covariance is that of all tokens, in which the concept is most of the variance, so that
    # mass-mean keeps more of the noise of a few than of the concept.
    assert cosines[0] > 0.9
    assert cosines[2] > 0.8


@pytest.mark.parametrize("spread", [False, True], ids=["flat", "outliers"])
def test_noise_turns_directions_by_as_much_as_is_said(spread):
    """Directions from 40 independent texts: how far apart they are, and how sure of that."""
    scales = 2 * torch.arange(1, 25) ** -0.5 if spread else None
    model = PlantedDirection(strength=1.0, spread=scales)
    vectors, reliable, dimensions = [], [], []
    for seed in range(40):
        told = found(model, labelled(seed=seed, concepts=("even", "position")))
        vectors.append(told.vectors[0])
        reliable.append(told.reliability[0])
        dimensions.append(told.dimensions[0])
    units = torch.nn.functional.normalize(torch.stack(vectors, dim=2), dim=-1)
    cosines = units @ units.mT
    pairs = cosines[..., ~torch.eye(40, dtype=torch.bool)]
    said, dimensions = torch.stack(reliable).mean(0), torch.stack(dimensions).mean(0)
    assert ((pairs.mean(-1) - said)[0].abs() < 0.06).all(), (pairs.mean(-1), said)
    # Where there is nothing, two texts agree on nothing, and their spread is that of noise.
    assert (pairs.mean(-1)[1].abs() < 0.05).all()
    # Where few dimensions have most of the variance what is said is a bound.
    ratio = pairs.std(-1)[1] / dimensions**-0.5
    assert ((ratio > (0.7 if spread else 0.85)) & (ratio < 1.25)).all(), ratio


def test_the_expected_cosine_of_two_halves_is_the_formula():
    """‖δ‖²/(‖δ‖² + 4 tr Σ/n): n tokens in a half, half of them of each side."""
    model = PlantedDirection(strength=1.0)
    halves = [found(model, labelled(seed=seed)).split_half[0, EVEN, 0] for seed in range(40)]
    expected = 1 / (1 + 4 * 24 / 256)
    assert torch.stack(halves).mean().item() == pytest.approx(expected, abs=0.04)


def test_too_few_tokens_are_nothing_to_fit_on(parts):
    stimulus = labelled(rows=16)
    values = stimulus.labels.values.clone()
    values[EVEN] = values[EVEN].clamp(max=0)
    told = found(
        PlantedDirection(),
        dataclasses.replace(stimulus, labels=dataclasses.replace(stimulus.labels, values=values)),
    )
    assert told.too_few.tolist() == [True, False, False]
    assert told.vectors[:, EVEN].isnan().all()
    assert told.vectors[:, 1:].isfinite().all()
    assert told.tokens[:, EVEN, 0].tolist() == [0, 0, 0]
    assert (told.tokens[:, 1:] >= FEWEST).all()


def test_reasons(parts):
    stimulus = labelled(rows=8, concepts=("even",))
    labels = dataclasses.replace(stimulus.labels, names=(), values=stimulus.labels.values[:0])
    nothing = dataclasses.replace(stimulus, labels=labels)
    _, reasons = collect(parts, nothing, {"directions": DirectionsCollector})
    assert reasons["directions"] == "no concepts were given: pass concepts="
    split = torch.full_like(stimulus.labels.split, EVALUATION)
    alone = dataclasses.replace(stimulus, labels=dataclasses.replace(stimulus.labels, split=split))
    _, reasons = collect(parts, alone, {"directions": DirectionsCollector})
    assert "there are no sequences to fit directions on" in reasons["directions"]


def test_a_model_that_has_diverged_says_so_in_the_layers_where_it_has():
    parts = find_parts(find_language_model(model := PlantedDirection()))
    with torch.no_grad():
        model.block[0].output.weight[5] = math.nan
    collected, reasons = collect(parts, labelled(), {"directions": DirectionsCollector})
    assert reasons == {}
    told = collected["directions"]
    assert told.vectors[0].isfinite().all()
    assert told.vectors[1].isnan().any(-1).all()


def test_methods_are_three(told):
    assert told.vectors.shape == (2, 3, len(METHODS), 24)
    assert told.counts.shape[:4] == (2, 3, len(METHODS), 2)
    assert told.halves.shape == (2, 2, 3, len(METHODS), 24)
