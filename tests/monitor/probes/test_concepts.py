"""`concepts`: a planted direction that is turned by known angles between measurements, what noise
alone leaves of a cosine, labels that mean nothing, and what cannot be told.
"""

import dataclasses
import math

import pytest
import torch
from scipy.special import ndtr

from monitor.capture import Observation
from monitor.evidence import Evidence
from monitor.features import METHODS
from monitor.features.permuting import permuted_labels
from monitor.labels import EVALUATION, FEWEST
from monitor.memory import Memory
from monitor.probes import concepts
from monitor.record import Reading
from tests.models.planted_direction import PlantedDirection, found, labelled
from tests.monitor.probes.test_contract import WHEN

DIFF = METHODS.index("diff_in_means")


def observed(model, stimulus=None):
    stimulus = stimulus or labelled()
    features = {"directions": found(model, stimulus)}
    return {"concepts": Observation(stimulus=stimulus, vocab_size=4096, features=features)}


def table(seen, memory=None):
    memory = memory or Memory()
    evidence = Evidence(observations=seen, previous=memory.previous, first=memory.first)
    return Reading.build(concepts.SPEC, WHEN, concepts.compute(evidence)).table.to_pandas()


def row(rows, *, concept="even", method="diff_in_means", layer=-1):
    is_it = (rows.concept == concept) & (rows.method == method) & (rows.layer == layer)
    (one,) = rows[is_it].to_dict("records")
    return one


def without(stimulus, change):
    """The stimulus with its labels changed."""
    values = change(stimulus.labels.values.clone())
    return dataclasses.replace(stimulus, labels=dataclasses.replace(stimulus.labels, values=values))


def test_a_planted_concept_and_two_that_mean_nothing():
    rows = table(observed(PlantedDirection(strength=2.0), labelled(rows=64)))
    assert len(rows) == 2 * 3 * 3
    assert set(rows.validity) == {"ok"}
    assert set(rows.n) == {32}
    for method in METHODS:
        even, position, by_id = (
            row(rows, concept=name, method=method) for name in ("even", "position", "id")
        )
        assert even["auc"] == pytest.approx(ndtr(math.sqrt(2)), abs=0.03)
        assert even["accuracy"] == pytest.approx(ndtr(1.0), abs=0.04)
        assert even["selectivity"] > 0.2
        assert even["split_half"] > 0.9
        for nothing in (position, by_id):
            for field, chance in (("auc", 0.5), ("accuracy", 0.5), ("selectivity", 0.0)):
                assert nothing[f"{field}_null"] == chance
                assert abs(nothing[field] - chance) < 4 * nothing[f"{field}_stderr"]
            assert abs(nothing["split_half"]) < 4 * nothing["split_half_null_sd"]


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_drift_is_the_angle_by_which_the_concept_was_turned(degrees):
    memory = Memory()
    earlier = observed(PlantedDirection(strength=6.0))
    assert math.isnan(row(table(earlier, memory))["drift_first"])
    memory.keep(earlier)
    turned = PlantedDirection(strength=6.0, angle=math.radians(degrees))
    rows = table(observed(turned), memory)
    expected = math.cos(math.radians(degrees))
    for field in ("drift_previous", "drift_first"):
        even = row(rows)
        # Both are fitted on the same tokens, with the same noise.
        assert even[field] == pytest.approx(expected, abs=0.06)
        assert even[f"{field}_null"] > 0.98
        beyond = even[field] < even[f"{field}_null"] - 3 * even[f"{field}_null_sd"]
        assert beyond == (degrees > 0)


@pytest.mark.parametrize("grouped", [True, False])
def test_documents_that_are_alike_in_themselves_are_as_many_as_they_are(grouped):
    """32 documents of 8 windows, each of its own words and with a label that means nothing: how far
    from chance a concept is in its standard errors. Windows taken for independent make these less
    than half of what they should be.
    """
    model, documents, windows = PlantedDirection(strength=0.0, width=12), 32, 8
    document = torch.arange(documents).repeat_interleave(windows)
    source = document if grouped else torch.arange(len(document))
    split = torch.tensor([0, 2, 1, 2]).repeat(documents)[:documents][document]
    away = []
    for seed in range(24):
        random = torch.Generator().manual_seed(seed)
        own = torch.randint(4096, (documents, 4), generator=random)
        pick = torch.randint(4, (len(document), 17), generator=random)
        # As many of each side in each part: documents 4, 8, … apart are for the same.
        order = torch.rand(8, 4, generator=random).argsort(0)
        sides = ((order % 2) * 2 - 1).flatten()
        stimulus = labelled(rows=len(document), context=17, concepts=("even",), source=source)
        values = sides[document][:, None].expand(-1, 17).to(torch.int8)[None].clone()
        labels = dataclasses.replace(stimulus.labels, values=values, split=split)
        its = dataclasses.replace(stimulus, tokens=own[document].gather(1, pick), labels=labels)
        even = row(table(observed(model, its)))
        assert even["n"] == (16 if grouped else 128)
        away.append((even["auc"] - 0.5) / even["auc_stderr"])
    spread = torch.tensor(away).square().mean().sqrt()
    if grouped:
        assert 0.7 < spread < 1.5
    else:
        assert spread > 2


def test_previous_and_first_are_those_of_the_measurements_before():
    memory = Memory()
    for degrees in (0, 20):
        memory.keep(observed(PlantedDirection(strength=6.0, angle=math.radians(degrees))))
    even = row(table(observed(PlantedDirection(strength=6.0, angle=math.radians(60))), memory))
    assert even["drift_previous"] == pytest.approx(math.cos(math.radians(40)), abs=0.03)
    assert even["drift_first"] == pytest.approx(math.cos(math.radians(60)), abs=0.03)


def test_an_unturned_direction_lies_at_its_null_on_other_text():
    """Each text is another sample of what noise alone does: the null says how much."""
    model = PlantedDirection(strength=1.0)
    standing = []
    for seed in range(30):
        memory = Memory()
        memory.keep(observed(model, labelled(seed=2 * seed, concepts=("even",))))
        rows = table(observed(model, labelled(seed=2 * seed + 1, concepts=("even",))), memory)
        its = [row(rows, method=method) for method in METHODS]
        standing.append(
            [
                (one["drift_first"] - one["drift_first_null"]) / one["drift_first_null_sd"]
                for one in its
            ]
        )
    standing = torch.tensor(standing)
    assert (standing.mean(0).abs() < 0.7).all(), standing.mean(0)
    assert ((standing.std(0) > 0.5) & (standing.std(0) < 1.8)).all(), standing.std(0)


def test_impostor_a_direction_of_noise_seems_to_turn_and_its_null_says_why():
    """What labels of nothing find turns with the noise of the embedding: far, and no further than
    its null.
    """
    memory = Memory()
    memory.keep(observed(PlantedDirection(strength=0.0, seed=0)))
    rows = table(observed(PlantedDirection(strength=0.0, seed=1)), memory)
    nothing = row(rows, concept="position")
    assert abs(nothing["drift_first"]) < 0.7
    assert nothing["drift_first_null"] < 0.5
    assert nothing["drift_first"] > nothing["drift_first_null"] - 3 * nothing["drift_first_null_sd"]


def test_impostor_token_ids_known_by_heart_are_not_selected():
    stimulus = labelled(rows=64, vocab_size=8)
    rows = table(observed(PlantedDirection(strength=0.0, vocab_size=8), stimulus))
    by_id = row(rows, concept="id")
    assert by_id["auc"] > 0.95
    assert by_id["selectivity"] < 0.1 + 4 * by_id["selectivity_stderr"]


def test_too_few_tokens_are_told_of_and_say_nothing():
    def few(values):
        evens = values[0].view(-1)
        (having,) = (evens > 0).nonzero(as_tuple=True)
        evens[having[FEWEST - 1 :]] = 0
        return values

    rows = table(observed(PlantedDirection(), without(labelled(), few)))
    even = rows[rows.concept == "even"]
    assert even.validity.str.startswith("too few tokens").all()
    for field in concepts.SPEC.fields:
        assert even[field.name].isna().all(), field.name
    assert set(rows[rows.concept != "even"].validity) == {"ok"}


def test_a_diverged_model_is_not_at_chance_but_not_known():
    """All scores that are no number lie on one side, which would be an accuracy of 1/2."""
    seen = observed(PlantedDirection())
    told = seen["concepts"].features["directions"]
    broken = dataclasses.replace(told, vectors=torch.full_like(told.vectors, math.nan))
    features = {"directions": broken}
    rows = table({"concepts": dataclasses.replace(seen["concepts"], features=features)})
    assert rows.auc.isna().all()
    assert (rows.validity == "auc is not finite").all()


def test_memory_keeps_directions_and_no_counts():
    memory = Memory()
    seen = observed(PlantedDirection())
    memory.keep(seen)
    kept = memory.previous["concepts"].features["directions"]
    assert kept.counts is None
    assert torch.equal(kept.vectors, seen["concepts"].features["directions"].vectors)
    # A diverged model is nothing to compare with.
    thresholds = torch.full_like(kept.thresholds, math.nan)
    features = {"directions": dataclasses.replace(kept, thresholds=thresholds)}
    memory.keep({"concepts": dataclasses.replace(seen["concepts"], features=features)})
    assert memory.previous["concepts"].features["directions"] is kept


def test_other_concepts_or_another_shape_are_nothing_to_compare_with():
    memory = Memory()
    memory.keep(observed(PlantedDirection(), labelled(concepts=("even",))))
    rows = table(observed(PlantedDirection(), labelled(concepts=("position",))), memory)
    assert rows.drift_first.isna().all()
    wider = table(observed(PlantedDirection(width=32), labelled(concepts=("even",))), memory)
    assert wider.drift_first.isna().all()


def test_the_spread_of_noise_in_its_limits():
    dimensions = torch.tensor([4.0, 100.0])
    nothing = concepts.noise_spread(torch.zeros(2), dimensions)
    torch.testing.assert_close(nothing, dimensions.rsqrt())
    assert (concepts.noise_spread(torch.ones(2), dimensions) == 0).all()


def test_reasons():
    rows = table({})
    assert rows.validity.tolist() == ["there is nothing to look at: pass text= or concepts="]


def test_a_concept_of_which_no_token_counts_has_too_few():
    """As where nothing lacks it, so that there is nothing to balance."""
    stimulus = without(labelled(concepts=("even",)), torch.zeros_like)
    rows = table(observed(PlantedDirection(), stimulus))
    assert set(rows.validity.str[:14]) == {"too few tokens"}


def test_where_all_labelled_tokens_are_one_there_is_no_control_task():
    """As with whole texts that end alike: only where they end do they count."""
    stimulus = labelled(rows=96, concepts=("position",))
    stimulus.tokens[:, -1] = 7
    values = stimulus.labels.values.clone()
    values[:, :, :-1] = 0
    rows = table(observed(PlantedDirection(), without(stimulus, lambda _: values)))
    told = row(rows, concept="position", layer=0)
    assert told["validity"] == "ok"
    assert 0.2 < told["auc"] < 0.8
    assert math.isnan(told["selectivity"])


def test_labels_are_permuted_among_the_tokens_that_have_one():
    stimulus = labelled(rows=64, concepts=("position",))
    values = stimulus.labels.values.clone()
    values[:, :, :-1] = 0
    labels = without(stimulus, lambda _: values).labels
    permuted = permuted_labels(labels, seed=0)[0]
    fitting = labels.split != EVALUATION
    assert (permuted[fitting, -1] != 0).all()
    assert (permuted[:, :-1] == 0).all()
    assert (permuted[~fitting] == 0).all()
    assert (permuted[fitting, -1] != values[0, fitting, -1]).any()
