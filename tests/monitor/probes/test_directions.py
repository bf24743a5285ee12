"""`directions`: vectors that score, steer and erase as their documentation says, in the model in
which the direction was planted.
"""

import math
import re

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation
from monitor.evidence import Evidence
from monitor.features import METHODS
from monitor.labels import EVALUATION
from monitor.measure import measure
from monitor.parts import activations, find_parts
from monitor.probes import directions
from monitor.record import Reading
from tests.models.concepts import CONCEPTS
from tests.models.planted_direction import PlantedDirection, found, labelled
from tests.monitor.probes.test_contract import WHEN


@pytest.fixture(scope="module")
def model():
    return PlantedDirection(strength=4.0, mean=3.0)


@pytest.fixture(scope="module")
def rows(model):
    stimulus = labelled()
    features = {"directions": found(model, stimulus)}
    seen = Observation(stimulus=stimulus, vocab_size=4096, features=features)
    columns = directions.compute(Evidence(observations={"concepts": seen}))
    return Reading.build(directions.SPEC, WHEN, columns).table.to_pandas()


def vector(rows, method="diff_in_means", concept="even"):
    chosen = (rows.concept == concept) & (rows.method == method) & (rows.layer == -1)
    (found,) = rows[chosen].vector
    return torch.tensor(found)


@pytest.fixture(scope="module")
def fresh(model):
    """Tokens of other text: what enters the first block, and whether they have the concept."""
    tokens = labelled(seed=99, rows=64).tokens
    parts = find_parts(find_language_model(model))
    stream = activations(parts, tokens, sites=["residual_before"])["residual_before", 0]
    return stream.flatten(0, 1), (tokens % 2 == 0).flatten()


def test_one_row_for_each_layer_concept_and_method(rows):
    assert len(rows) == 2 * 3 * 3
    assert set(rows.layer) == {-1, 0}
    assert set(rows.method) == set(METHODS)
    assert {len(each) for each in rows.vector} == {24}
    assert all(each.dtype == np.float32 for each in rows.vector)


@pytest.mark.parametrize("method", METHODS)
def test_contexts_are_of_the_tokens_furthest_along_in_sequences_not_fitted_on(method, rows, model):
    stimulus = labelled()
    parts = find_parts(find_language_model(model))
    sites = ["residual_before"]
    stream = activations(parts, stimulus.tokens, sites=sites)["residual_before", 0]
    along = (stream @ vector(rows, method)).where(stimulus.labels.used, -torch.inf)
    evaluated = (stimulus.labels.split == EVALUATION).nonzero().flatten()
    furthest, position = along[evaluated].max(1)
    best = furthest.argsort(descending=True)[:5]
    expected = stimulus.tokens[evaluated[best], position[best]].tolist()
    chosen = (rows.concept == "even") & (rows.method == method) & (rows.layer == -1)
    (contexts,) = rows[chosen].contexts
    assert [int(token) for token in re.findall(r"\[(\d+)\]", contexts)] == expected
    assert all(token % 2 == 0 for token in expected)


@pytest.mark.parametrize("method", METHODS)
def test_they_score_other_tokens(method, rows, fresh):
    stream, even = fresh
    along = stream @ vector(rows, method)
    assert along[even].mean() > along[~even].mean()
    best = (along > along.median()) == even
    # Φ(2) of the tokens lie on their side.
    assert best.float().mean() > 0.94


def test_steering_by_the_difference_of_means_makes_one_class_the_other(rows, fresh):
    stream, even = fresh
    steered = stream[~even] + vector(rows)
    assert (steered.mean(0) - stream[even].mean(0)).norm() < 0.15 * vector(rows).norm()


def test_erasing_leaves_nothing_to_be_read_along_what_was_planted(rows, fresh, model):
    stream, even = fresh
    unit = vector(rows) / vector(rows).norm()
    erased = stream - (stream @ unit)[:, None] * unit
    before, after = (
        float((rows_[even].mean(0) - rows_[~even].mean(0)) @ model.planted)
        for rows_ in (stream, erased)
    )
    assert before == pytest.approx(4.0, abs=0.2)
    assert abs(after) < 0.3


def test_what_was_not_fitted_has_no_vector_but_a_reason():
    stimulus = labelled(rows=4, context=9, concepts=("even",))
    features = {"directions": found(PlantedDirection(), stimulus)}
    seen = Observation(stimulus=stimulus, vocab_size=4096, features=features)
    columns = directions.compute(Evidence(observations={"concepts": seen}))
    rows = Reading.build(directions.SPEC, WHEN, columns).table.to_pandas()
    assert rows.vector.isna().all()
    assert set(rows.validity) == {"too few tokens"}


def test_they_are_a_table_of_any_model_that_is_measured():
    torch.manual_seed(0)
    model = PlantedDirection(strength=8.0, angle=math.pi / 4, vocab_size=64)
    text = torch.randint(64, (32, 40))
    told = measure(model, text=text, concepts=CONCEPTS, probes=["directions", "concepts"])
    vectors, judged = told["directions"], told["concepts"]
    assert (vectors[["layer", "concept", "method"]] == judged[["layer", "concept", "method"]]).all(
        axis=None
    )
    cosine = torch.cosine_similarity(vector(vectors), model.planted, dim=0)
    assert cosine > 0.95
