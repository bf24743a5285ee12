"""`analogies`: against words compared one by one, with gender and royalty planted in an embedding,
on words that look like analogies without any direction, and its errors against repeated draws.
"""

import math

import pytest
import torch

from monitor.analogies import Analogies, analogies_stimulus
from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe_features
from monitor.evidence import Evidence
from monitor.features.analogies import WordProducts
from monitor.parts import Parts, find_parts
from monitor.probes import analogies
from tests.models.planted_words import (
    GENDER,
    ROYALTY,
    model_of,
    paired_vectors,
    royal_vectors,
)
from tests.oracles import analogies as oracle


def table(vectors, **relations):
    """The probe's table where word i + 1 has the vector i."""
    given = [Analogies(name, quadruples=words) for name, words in relations.items()]
    stimulus = analogies_stimulus(given, bos=None, context=16, vocab_size=len(vectors) + 1)
    ids = stimulus.tokens[:, 1].unique()
    rows = vectors.double()[ids - 1]
    products = WordProducts(layers=(-1,), ids=ids, products=(rows @ rows.T)[None])
    observation = Observation(stimulus=stimulus, vocab_size=99, features={"analogies": products})
    return analogies.compute(Evidence(observations={"analogies": observation}))


def row(columns, number=0):
    return {name: values[number] for name, values in columns.items()}


@pytest.mark.parametrize("seed", range(5))
def test_every_number_is_that_of_words_compared_one_by_one(seed):
    random = torch.Generator().manual_seed(seed)
    vectors = torch.randn(12, 4, generator=random) + 0.5
    quadruples = [
        tuple(int(w) + 1 for w in torch.randperm(12, generator=random)[:4]) for _ in range(9)
    ]
    quadruples = list(
        {(frozenset((a, c)), b, d): (a, b, c, d) for a, b, c, d in quadruples}.values()
    )
    found = row(table(vectors, random=quadruples))
    used = {w for q in quadruples for w in q}
    by_id = {word: vectors[word - 1].double().numpy() for word in sorted(used)}
    expected = oracle.accuracies(by_id, quadruples)
    names = ("accuracy", "accuracy_inputs_allowed", "accuracy_without_offset")
    assert [found[name] for name in names] == pytest.approx(expected)
    least = math.sqrt((len(quadruples) + 0.5) * 0.5 / (len(quadruples) + 1) ** 2)
    for place, name in enumerate(names):
        stderr = oracle.stderr(quadruples, lambda some, i=place: oracle.accuracies(by_id, some)[i])
        assert found[f"{name}_stderr"] == pytest.approx(stderr) or stderr < least
    assert found["accuracy_null"] == found["accuracy_without_offset"]
    assert found["accuracy_gain"] == pytest.approx(expected[0] - expected[2])
    assert found["offset_similarity"] == pytest.approx(oracle.offset_similarity(by_id, quadruples))
    assert found["offset_similarity_stderr"] == pytest.approx(
        oracle.stderr(quadruples, lambda some: oracle.offset_similarity(by_id, some))
    )
    assert found["accuracy_without_offset_null"] == pytest.approx(1 / (len(used) - 3))
    assert found["accuracy_inputs_allowed_null"] == pytest.approx(1 / len(used))
    assert found["n"] == len(quadruples)


def test_gender_and_royalty_that_were_planted_in_an_embedding_are_found_in_every_layer():
    model = find_language_model(model_of(royal_vectors()))
    given = [Analogies("royalty", quadruples=ROYALTY), Analogies("gender", quadruples=GENDER)]
    stimulus = analogies_stimulus(given, bos=model.bos, context=16, vocab_size=model.vocab_size)
    observation = observe_features(find_parts(model), stimulus, ["analogies"])
    columns = analogies.compute(Evidence(observations={"analogies": observation}))
    assert columns["layer"] == [-1, 0, 1] * 2
    assert columns["relation"] == ["royalty"] * 3 + ["gender"] * 3
    for number in range(6):
        found = row(columns, number)
        assert found["validity"] == "ok"
        assert found["accuracy"] == 1
        assert found["accuracy_without_offset"] == 0
        assert found["accuracy_gain"] > 3 * found["accuracy_gain_stderr"]
        assert found["offset_similarity"] > 0.9
        null, spread = found["offset_similarity_null"], found["offset_similarity_null_sd"]
        assert found["offset_similarity"] > null + spread


def test_an_analogy_without_a_direction_is_told_apart_by_the_numbers_beside_its_accuracy():
    vectors, quadruples = paired_vectors(12)
    found = row(table(vectors, impostor=quadruples))
    assert found["accuracy"] == found["accuracy_without_offset"] == found["accuracy_null"] == 1
    assert found["accuracy_inputs_allowed"] == 0
    assert found["accuracy_gain"] == 0
    assert found["accuracy_gain_stderr"] > 0
    excess = found["offset_similarity"] - found["offset_similarity_null"]
    assert abs(excess) < 3 * found["offset_similarity_null_sd"]


def test_words_of_two_clusters_have_offsets_as_alike_when_paired_otherwise():
    random = torch.Generator().manual_seed(0)
    plural = torch.randn(20, generator=random)
    vectors = torch.randn(20, 20, generator=random)
    vectors[10:] = 3 * plural + torch.randn(10, 20, generator=random)
    # The second words are drawn anew: no word has a partner.
    quadruples = [(11 + i, 1 + i, 2 + i, 12 + i) for i in range(0, 9, 2)]
    found = row(table(vectors, clusters=quadruples))
    assert found["offset_similarity"] > 10 * found["offset_similarity_stderr"]
    excess = found["offset_similarity"] - found["offset_similarity_null"]
    assert abs(excess) < 3 * found["offset_similarity_null_sd"]


def test_a_stream_of_zeros_and_words_that_are_alike_are_chance_and_no_error():
    found = row(table(torch.zeros(12, 8), nothing=[(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]))
    assert found["validity"] == "ok"
    assert found["accuracy"] == pytest.approx(1 / 9)
    assert found["offset_similarity"] == 0


@pytest.mark.parametrize("shared", [False, True])
def test_standard_errors_are_as_large_as_draws_scatter(shared):
    """Pairs of one relation with so much noise that some answers are wrong; `shared`: every two
    pairs make a quadruple, so that a word is in many.
    """
    random = torch.Generator().manual_seed(1)
    pairs = [(2 * i + 1, 2 * i + 2) for i in range(14)]
    couples = [(i, j) for i in range(14) for j in range(14) if i < j]
    if not shared:
        couples = [(i, i + 1) for i in range(0, 14, 2)]
    quadruples = [(*pairs[i], pairs[j][1], pairs[j][0]) for i, j in couples]
    offset = torch.eye(24)[0]
    values = {"accuracy": [], "offset_similarity": []}
    errors = {"accuracy": [], "offset_similarity": []}
    for _ in range(60):
        vectors = torch.randn(14, 1, 24, generator=random)
        vectors = vectors + torch.stack([offset, -offset])
        vectors = vectors + 0.9 * torch.randn(14, 2, 24, generator=random)
        found = row(table(vectors.flatten(0, 1), one=quadruples))
        for name, seen in values.items():
            seen.append(found[name])
            errors[name].append(found[f"{name}_stderr"])
    for name, seen in values.items():
        spread = torch.tensor(seen).std().item()
        error = torch.tensor(errors[name]).square().mean().sqrt().item()
        assert 0.75 < error / spread < 1.6, (name, error, spread)


def test_three_pairs_cannot_be_paired_otherwise_and_their_offsets_are_left_out():
    pairs = [(1, 2), (3, 4), (5, 6)]
    quadruples = [(*pairs[i], *reversed(pairs[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    found = row(table(torch.randn(6, 8), few=quadruples))
    assert found["validity"] == "ok"
    assert found["offset_similarity"] is None
    assert found["accuracy"] is not None


def test_without_analogies_the_table_says_so():
    columns = analogies.compute(Evidence(observations={}))
    assert columns["validity"] == ["no analogies were given: pass Analogies(...) in concepts="]
    assert columns["accuracy"] is None


def test_a_model_whose_blocks_are_not_found_gives_the_reason():
    stimulus = analogies_stimulus(
        [Analogies("royalty", quadruples=ROYALTY)], bos=None, context=16, vocab_size=20
    )
    model = find_language_model(model_of(royal_vectors()))
    seen = observe_features(Parts.none(model, "they are hidden"), stimulus, ["analogies"])
    columns = analogies.compute(Evidence(observations={"analogies": seen}))
    assert columns["validity"] == ["blocks: they are hidden"]


@pytest.mark.parametrize(
    ("quadruples", "says"),
    [
        ([(1, 2, 3, 4), (4, 3, 2, 1), (2, 1, 4, 3)], "all quadruples have the same words"),
    ],
)
def test_quadruples_that_say_nothing_of_their_own_scatter_are_not_judged(quadruples, says):
    found = row(table(torch.randn(9, 8), few=quadruples, other=[(5, 6, 7, 8), *quadruples[1:]]))
    assert says in found["validity"]
    assert found["accuracy"] is None
    assert row(table(torch.randn(9, 8), few=quadruples))["validity"] != "ok"
