"""`sparse_probing`: a concept planted in one neuron and in sixteen, labels that mean nothing,
errors that cover, models without neurons, and through a `Subject`.
"""

from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.batches import StimulusOptions
from monitor.capture import observe_features
from monitor.evidence import Evidence
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import find_parts
from monitor.probes import select, sparse_probing
from monitor.probes.sparse_probing import f1
from monitor.record import Moment, Reading
from monitor.stimuli import Stimulus, labelled_stimulus
from monitor.subject import Subject
from tests.models import AttentionOnly, gpt2
from tests.models.concept_neurons import ConceptNeurons
from tests.models.hugging_face import mixtral

WHEN = Moment(run="r", attempt=1, step=3, tokens=None, time=datetime(2024, 5, 1, tzinfo=UTC))


def labelled(*, batch=64, context=32, vocabulary=96, seed=0, **concepts) -> Stimulus:
    """Random tokens; a concept is a function from ids to sides (±1)."""
    random = np.random.default_rng(seed)
    tokens = random.integers(vocabulary, size=(batch, context))
    values = [side(tokens, random) for side in concepts.values()]
    labels = Labels(
        names=tuple(concepts),
        values=torch.from_numpy(np.array(values, dtype=np.int8).reshape(-1, *tokens.shape)),
        split=torch.tensor([FIRST_HALF, SECOND_HALF, EVALUATION, EVALUATION]).repeat(batch // 4),
        length=torch.full((batch,), context),
        source=torch.arange(batch),
    )
    return labelled_stimulus("concepts", torch.from_numpy(tokens), labels)


def even(tokens, random):
    return 1 - 2 * (tokens % 2)


def at_random(tokens, random):
    return random.choice([-1, 1], size=tokens.shape)


def by_id(tokens, random):
    return random.permutation(np.arange(tokens.max() + 1) % 2 * 2 - 1)[tokens]


def frame(model, stimulus):
    """The table, a row a layer, concept and k."""
    parts = find_parts(find_language_model(model))
    seen = {"concepts": observe_features(parts, stimulus, ["sparse"])}
    columns = sparse_probing.compute(Evidence(observations=seen))
    reading = Reading.build(sparse_probing.SPEC, WHEN, columns)
    return reading.table.to_pandas().set_index(["layer", "concept", "k"])


def test_a_neuron_that_is_the_concept():
    table = frame(ConceptNeurons(planted=(3,)), labelled(even=even))
    assert (table.validity == "ok").all()
    assert list(table.index.get_level_values("k")) == [1, 2, 4, 8, 16, 32]
    one = table.loc[0, "even", 1]
    assert one.f1 == 1
    # No other neuron tells of it, and one of 8 random ones may be it.
    assert one.f1_null < 0.65
    assert one.selectivity > 0.3
    assert one.selectivity > 5 * one.selectivity_stderr
    assert one.n == 32


def test_a_concept_that_is_spread_over_sixteen_neurons():
    """d neurons, each with the classes' means s of its standard deviation apart, tell of Φ(s√d/2)
    on either side; these are not quite normal and independent.
    """
    model = ConceptNeurons(planted=tuple(range(0, 32, 2)), signal=0.5, width=256)
    # Without the rectifier's kink neurons are normal.
    model.blocks[0].inputs.bias.data += 8
    table = frame(model, labelled(even=even, batch=128, vocabulary=96))
    told = table.loc[0, "even"]
    growing = told.f1.loc[[1, 2, 4, 8, 16]]
    assert growing.is_monotonic_increasing
    # Found, and more neurons than carry it add nothing.
    assert told.f1[16] - told.f1[1] > 0.15
    assert told.f1[32] - told.f1[16] < 0.03
    # Some of the random ones carry it as well, and so fewer than the best.
    assert (told.f1 - told.f1_null).loc[[1, 2, 4, 8]].min() > 0.05


def test_a_random_label_for_every_token():
    """Chance at every k, and no better than the control task, though neurons are skewed: F1 alone
    would have been beyond a coin's, or the control task's, by many of its errors.
    """
    chance, beyond, by_f1 = [], [], []
    for seed in range(12):
        told = frame(skewed(seed), labelled(noise=at_random, seed=seed)).loc[0, "noise"]
        assert (told.f1 < 0.68).all()
        chance.append((told.accuracy - 0.5) / told.accuracy_stderr)
        beyond.append(told.selectivity / told.selectivity_stderr)
        by_f1.append((told.f1 - told.control_f1) / told.f1_stderr)
    assert np.abs(np.mean(chance, axis=0)).max() < 3 / 12**0.5
    assert np.std(chance) < 1.4
    assert np.max(chance) < 4
    # It reads no token id, which its control task may be told from.
    assert np.max(beyond) < 4
    assert np.max(by_f1) > 6


def skewed(seed: int) -> ConceptNeurons:
    """Of a concept model whose concept nobody reads, neurons that are mostly at 0."""
    model = ConceptNeurons(planted=(), neurons=128, seed=seed)
    model.blocks[0].inputs.bias.data -= 1
    return model


def test_a_random_label_for_every_token_id():
    """It is told with many neurons, and no better than its control task: learnt by heart."""
    seen = []
    for seed in range(4):
        model = ConceptNeurons(planted=(), neurons=256, vocab_size=40, width=64, seed=seed)
        stimulus = labelled(by_id=by_id, vocabulary=40, batch=256, seed=seed)
        seen.append(frame(model, stimulus).loc[0, "by_id"].loc[256])
    assert min(row.f1 for row in seen) > 0.9
    assert max(abs(row.selectivity) for row in seen) < 0.07
    # Against guessing, and even against random neurons at few, it would have passed.
    assert min(row.f1 - 2 / 3 - 5 * row.f1_stderr for row in seen) > 0


def test_errors_are_those_of_the_evaluation():
    """F1 over draws of sequences, whose tokens are alike in how hard they are."""
    random = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(400):
        answers = torch.zeros(16, 2, 2, dtype=torch.int64)
        for sequence in range(64):
            right = random.beta(4, 2, size=2)
            for side in (0, 1):
                said = random.binomial(30, right[side])
                answers[sequence % 16, side, side] += said
                answers[sequence % 16, side, 1 - side] += 30 - said
        value, stderr = f1(answers)
        values.append(value.item())
        errors.append(stderr.item())
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)


def test_errors_where_sequences_are_fewer_than_groups():
    """Groups without sequences do not count as ones that agree."""
    stimulus = labelled(even=even, batch=24, context=64)
    model = ConceptNeurons(planted=(1, 2), signal=0.3)
    table = frame(model, stimulus).loc[0, "even"]
    parts = find_parts(find_language_model(model))
    answers = observe_features(parts, stimulus, ["sparse"]).features["sparse"].answers[0, 0, 0, 0]
    assert not answers[12:].any()
    left = [f1(answers.sum(0, keepdim=True) - answers[group][None])[0] for group in range(12)]
    expected = (np.var([value.item() for value in left]) * 11) ** 0.5
    assert table.f1_stderr[1] == pytest.approx(expected, rel=1e-5)


def test_the_difference_to_the_control_task_has_an_error_of_its_own():
    stimulus = labelled(even=even)
    told = frame(ConceptNeurons(planted=(1,), signal=0.5), stimulus).loc[0, "even"]
    both = np.hypot(told.accuracy_stderr, told.control_f1_stderr)
    # The same sequences are left out of both.
    assert (told.selectivity_stderr < 1.8 * both).all()
    assert (told.selectivity_stderr > 0.3 * both).all()


def test_too_few_tokens():
    def rarely(tokens, random):
        return np.where(random.random(tokens.shape) < 0.01, even(tokens, random), 0)

    table = frame(ConceptNeurons(), labelled(rare=rarely, even=even)).sort_index()
    rare = table.loc[0, "rare"]
    assert list(rare.index) == [-1]
    assert "too few tokens" in rare.validity.item()
    assert rare.f1.isna().all()
    assert (table.loc[0, "even"].validity == "ok").all()


def test_a_concept_of_one_token_id_has_no_control_task():
    def one(tokens, random):
        return np.where(tokens == 5, at_random(tokens, random), 0)

    table = frame(ConceptNeurons(), labelled(one=one, vocabulary=8)).loc[0, "one"]
    assert (table.validity == "ok").all()
    assert table.f1.notna().all()
    assert table.control_f1.isna().all()
    assert table.selectivity.isna().all()


@pytest.mark.parametrize("kind", ["attention_only", "mixtral"])
def test_without_neurons_it_says_so(kind):
    model = AttentionOnly() if kind == "attention_only" else mixtral()
    table = frame(model, labelled(even=even, vocabulary=48))
    assert list(table.index.get_level_values("k")) == [-1, -1]
    assert list(table.index.get_level_values("layer")) == [0, 1]
    assert table.validity.str.fullmatch("no neurons: .{10,}").all()
    assert table.f1.isna().all()


def test_without_concepts_it_says_what_to_pass():
    table = frame(gpt2(), labelled(vocabulary=48)).reset_index()
    assert table.validity.tolist() == ["no concepts were given: pass concepts="]
    assert (table.k.item(), table.layer.item(), table.concept.item()) == (-1, -1, "")


def test_activations_that_are_not_finite():
    model = ConceptNeurons(planted=(3,))
    stimulus = labelled(even=even, vocabulary=90)
    parts = find_parts(find_language_model(model))
    # As when training diverges after the parts were found.
    model.blocks[0].inputs.weight.data[7] = float("inf")
    seen = {"concepts": observe_features(parts, stimulus, ["sparse"])}
    columns = sparse_probing.compute(Evidence(observations=seen))
    assert columns["k"] == [1, 2, 4, 8, 16, 32]
    assert set(columns["validity"]) == {"there are activations that are not finite"}
    assert set(columns["f1"]) == {None}


def test_through_a_subject_twice():
    model = gpt2()
    found = find_language_model(model)
    probes = select(["sparse_probing"])
    options = StimulusOptions(text=None, context=32, sequences=4)
    subject = Subject.new(model, found, probes, options)
    stimulus = labelled(even=even, other=by_id, vocabulary=48)
    subject.stimuli["concepts"] = stimulus
    once, again = (subject.measure(probes, WHEN) for _ in range(2))
    assert once.failures == ()
    (one,), (two,) = once.readings, again.readings
    assert one.table.equals(two.table)
    table = one.table.to_pandas()
    assert set(table.layer) == {0, 1}
    assert set(table.concept) == {"even", "other"}
    assert set(table.validity) == {"ok"}
