"""What the neurons' collector adds up: against one neuron at a time on all tokens at once, cuts
into other chunks, means that are large, activations that are not finite, and how far sequences that
are alike within themselves can fool it.
"""

import dataclasses

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.features import Chunk, Collector
from monitor.features.contexts import CONTEXTS
from monitor.features.neurons import TOP, NeuronsCollector, NeuronsSeen
from monitor.features.permuting import permuted_labels
from monitor.features.tasks import shuffled_labels
from monitor.features.units import random_directions
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import Parts
from monitor.parts.blocks import Block
from monitor.stimuli import Stimulus, labelled_stimulus
from tests.models import AttentionOnly
from tests.oracles import neurons as oracle

POSITIONS = 33


def labelled(*concepts, batch=64, vocabulary=50, counting=0.8, shortest=POSITIONS, seed=0):
    """Random tokens; a concept is a function from ids to sides (±1). Some tokens do not count, and
    sequences are of lengths from `shortest` on.
    """
    random = np.random.default_rng(seed)
    tokens = random.integers(vocabulary, size=(batch, POSITIONS))
    values = np.zeros((len(concepts), batch, POSITIONS), dtype=np.int8)
    for place, side in enumerate(concepts):
        values[place] = side(tokens, random) * (random.random(tokens.shape) < counting)
    split = torch.tensor([FIRST_HALF, SECOND_HALF, EVALUATION, EVALUATION]).repeat(batch // 4)
    labels = Labels(
        names=tuple(f"concept {place}" for place in range(len(concepts))),
        values=torch.from_numpy(values),
        split=split,
        length=torch.from_numpy(random.integers(shortest, POSITIONS + 1, size=batch)),
        source=torch.arange(batch),
    )
    return labelled_stimulus("concepts", torch.from_numpy(tokens), labels)


def even(tokens, random):
    return 1 - 2 * (tokens % 2)


def small(tokens, random):
    return np.where(tokens < 20, 1, -1)


def at_random(tokens, random):
    return random.choice([-1, 1], size=tokens.shape)


def of_sequences(tokens, random):
    """Whole sequences are of one class, in each split as many of each."""
    return np.broadcast_to(np.where(np.arange(len(tokens)) // 4 % 2, 1, -1)[:, None], tokens.shape)


def parts_of(layers: int) -> Parts:
    model = find_language_model(AttentionOnly())
    blocks = tuple(Block(layer=layer, path=str(layer), taps={}) for layer in range(layers))
    return Parts(model=model, blocks=blocks, taps={})


def chunks(stimulus: Stimulus, split: int, at_once: int):
    """As a pass makes them."""
    labels = stimulus.labels
    for rows in (labels.split == split).nonzero().flatten().split(at_once):
        local, position = labels.used[rows].nonzero(as_tuple=True)
        ids = stimulus.tokens[rows][local, position]
        yield Chunk(split=split, row=rows[local], position=position, ids=ids)


def shown(stimulus: Stimulus, *activations: torch.Tensor, at_once: int = 5) -> NeuronsSeen:
    """What is collected of layers with these `activations` [batch, position, neuron]."""
    collector = NeuronsCollector(parts_of(len(activations)), stimulus)
    assert isinstance(collector, Collector)
    with torch.no_grad():
        for split in (FIRST_HALF, SECOND_HALF, EVALUATION):
            for chunk in chunks(stimulus, split, at_once):
                for layer, rows in enumerate(activations):
                    collector.see("mlp_post", layer, rows[chunk.row, chunk.position], chunk)
            collector.turn(split)
    return collector.collected()


def noise(stimulus: Stimulus, neurons: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*stimulus.tokens.shape, neurons, generator=random)


def telling(stimulus: Stimulus, neurons: int = 45, seed: int = 0) -> torch.Tensor:
    """Skewed activations of many scales, some of which tell concepts; the last two are dead."""
    random = torch.Generator().manual_seed(seed + 1)
    sides = stimulus.labels.values.float().movedim(0, -1)
    strengths = torch.randn(sides.shape[-1], neurons, generator=random)
    rows = torch.relu(noise(stimulus, neurons, seed) + sides @ strengths).square()
    rows = rows * torch.logspace(-1, 2, neurons)
    rows[..., -2:] = 0
    return rows


def fitted(stimulus: Stimulus, activations: torch.Tensor, *, without: int | None = None):
    """Rows and labels of the tokens to fit on, in float64; `without` one of the eight groups."""
    labels = stimulus.labels
    number = (labels.split != EVALUATION).cumsum(0) - 1
    kept = (labels.split != EVALUATION) & (number % 8 != (-1 if without is None else without))
    used = labels.used & kept[:, None]
    return activations[used].double().numpy(), labels.values[:, used].numpy()


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_against_one_neuron_at_a_time(mean):
    stimulus = labelled(even, small, shortest=20)
    activations = telling(stimulus)
    activations[..., :-2] += mean
    seen = shown(stimulus, activations)
    rows, labels = fitted(stimulus, activations)
    told, top = seen.estimates[0], seen.top[0]
    assert told["dead_share"].value == pytest.approx(oracle.dead_share(rows), abs=1e-6)
    living = rows[:, :-2]
    close = {"rel": 1e-5 if mean == 0 else 1e-3}
    expected = np.median(oracle.kurtoses(living))
    assert told["kurtosis"].value == pytest.approx(expected, **close)
    expected = oracle.class_selectivity(living, labels)
    assert told["class_selectivity"].value == pytest.approx(expected, **close)
    scores = oracle.scores(living, labels)
    best = np.argsort(-np.abs(scores).max(0), kind="stable")[:TOP]
    assert top.neuron.tolist() == best.tolist()
    assert top.concept.tolist() == np.abs(scores).argmax(0)[best].tolist()
    own = scores[top.concept, best]
    np.testing.assert_array_equal(top.sign, np.sign(own))
    np.testing.assert_allclose(top.score[0], np.abs(own), rtol=1e-3)
    np.testing.assert_allclose(top.kurtosis[0], oracle.kurtoses(living)[best], rtol=1e-3)


def test_standard_errors_leave_groups_of_sequences_out():
    stimulus = labelled(even, small)
    activations = telling(stimulus)
    seen = shown(stimulus, activations)
    told, top = seen.estimates[0], seen.top[0]
    medians, selectivities, scores = [], [], []
    for group in range(8):
        rows, labels = fitted(stimulus, activations[..., :-2], without=group)
        medians.append(np.median(oracle.kurtoses(rows)))
        selectivities.append(oracle.class_selectivity(rows, labels))
        scores.append(oracle.scores(rows, labels)[top.concept, top.neuron])
    for stderr, left_out in (
        (told["kurtosis"].stderr, medians),
        (told["class_selectivity"].stderr, selectivities),
        (top.score[1].numpy(), scores),
    ):
        spread = np.std(left_out, axis=0) * np.sqrt(7)
        np.testing.assert_allclose(stderr, spread, rtol=2e-3)


def test_chunks_do_not_matter():
    stimulus = labelled(even, small, shortest=20)
    activations = telling(stimulus)
    one, other = (shown(stimulus, activations, at_once=at_once) for at_once in (3, 32))
    for name in {*one.estimates[0]} - {"concepts_per_direction"}:
        value, stderr, _ = other.estimates[0][name]
        # Directions are of neurons in their standard deviations in the first chunk.
        assert one.estimates[0][name][:2] == pytest.approx((value, stderr), rel=1e-3), name
    assert one.top[0].contexts == other.top[0].contexts
    assert torch.equal(one.top[0].neuron, other.top[0].neuron)


def test_contexts_are_the_most_active_tokens_of_as_many_sequences():
    stimulus = labelled(even, shortest=9)
    activations = telling(stimulus)
    top = shown(stimulus, activations).top[0]
    evaluated = (stimulus.labels.split == EVALUATION).nonzero().flatten().tolist()
    length = stimulus.labels.length.tolist()
    for neuron, told in zip(top.neuron.tolist(), top.contexts, strict=True):
        active = activations[..., neuron].numpy()
        assert told == oracle.contexts(active, stimulus.tokens, length, evaluated)
        assert told.count("[") == CONTEXTS


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_standard_errors_are_those_of_other_sequences(share):
    """The spread over texts of what is told of the same neurons, and the errors that are claimed;
    sequences are alike within themselves.
    """
    values, errors = [], []
    for seed in range(60):
        stimulus = labelled(even, small, at_random, seed=seed)
        random = torch.Generator().manual_seed(seed)
        common = torch.randn(64, 1, 60, generator=random)
        rows = (1 - share) ** 0.5 * noise(stimulus, 60, seed) + share**0.5 * common
        strength = torch.linspace(0, 0.6, 60)
        rows = rows + stimulus.labels.values[0, ..., None] * strength
        told = shown(stimulus, rows.exp()).estimates[0]
        fields = ("kurtosis", "concepts_per_neuron", "selective_share", "class_selectivity")
        values.append([told[name].value for name in fields])
        errors.append([told[name].stderr for name in fields])
    spread = np.std(values, axis=0)
    claimed = np.sqrt(np.mean(np.square(errors), axis=0))
    assert (claimed > 0.7 * spread).all(), (claimed, spread)
    assert (claimed < 1.8 * spread).all(), (claimed, spread)


def test_permuted_labels_are_those_of_other_sequences():
    stimulus = labelled(at_random, of_sequences, shortest=20, counting=1.0)
    labels = stimulus.labels
    permuted = permuted_labels(labels, seed=0)
    fitting = labels.split != EVALUATION
    assert not permuted[:, ~fitting].any()
    assert not permuted[:, ~labels.used].any()
    assert permuted[:, labels.used & fitting[:, None]].all()
    assert not torch.equal(permuted, permuted_labels(labels, seed=1))
    own = {tuple(row[1:20].tolist()) for row in labels.values[1][fitting]}
    assert {tuple(row[1:20].tolist()) for row in permuted[1][fitting]} == own
    # Turned around, but in the order they were in.
    rows = fitting.nonzero().flatten().tolist()
    length = labels.length.tolist()
    texts = {row: "".join("+-"[int(v < 0)] for v in labels.values[0, row, 1:]) for row in rows}
    for row in rows:
        short = min(length) - 1
        part = "".join("+-"[int(v < 0)] for v in permuted[0, row, 1 : 1 + short // 2])
        found = [own for own in rows if part in texts[own][: length[own] - 1] * 2]
        assert set(found) - {row}


def test_the_labels_of_sources_stay_together():
    """Else those of a text in several windows, which has one class, would be mixed."""
    stimulus = labelled(of_sequences, shortest=20, counting=1.0)
    source = torch.arange(64) // 4
    whole = torch.where(source % 3 == 0, 1, -1).to(torch.int8)
    values = whole[:, None].expand(64, POSITIONS)[None].clone()
    labels = dataclasses.replace(stimulus.labels, source=source, values=values)
    permuted = permuted_labels(labels, seed=0)[0]
    fitting = labels.split != EVALUATION
    sides = []
    for number in range(16):
        (side,) = {*permuted[(source == number) & fitting].flatten().tolist()} - {0}
        sides.append(side)
    assert sides.count(1) == int((whole[::4] == 1).sum())
    assert sides != whole[::4].tolist()


def test_sequences_that_are_alike_within_themselves_do_not_tell_their_class():
    """The impostor: neurons that are different in every sequence, and a class that whole sequences
    have. Labels shuffled token by token say that chance could not do it; permuted ones say it does.
    """
    claimed, by_chance, shuffled = [], [], []
    for seed in range(20):
        stimulus = labelled(of_sequences, batch=32, seed=seed)
        random = torch.Generator().manual_seed(seed)
        activations = torch.randn(32, 1, 100, generator=random) + 0.3 * noise(stimulus, 100, seed)
        told = shown(stimulus, activations).estimates[0]["selective_share"]
        claimed.append(told.value)
        by_chance.append(shown(stimulus, activations).estimates[0]["concepts_per_neuron"].null)
        tokens = dataclasses.replace(stimulus.labels, values=shuffled_labels(stimulus))
        other = dataclasses.replace(stimulus, labels=tokens)
        shuffled.append(np.abs(oracle.scores(*fitted(other, activations))).max())
    assert np.mean(claimed) < 0.05
    assert np.mean(by_chance) < 0.05
    # What a threshold from shuffled tokens would be, and what is apart by chance.
    rows, labels = fitted(stimulus, activations)
    assert (np.abs(oracle.scores(rows, labels)) > max(shuffled)).mean() > 0.4


def test_random_directions_are_orthonormal_and_the_same_every_time():
    for neurons, expected in ((100, 64), (10, 10)):
        directions = random_directions(neurons)
        assert directions.shape == (neurons, expected)
        torch.testing.assert_close(directions.T @ directions, torch.eye(expected))
        assert torch.equal(directions, random_directions(neurons))


def test_one_layer_that_is_not_finite_leaves_the_others():
    stimulus = labelled(even)
    whole, broken = telling(stimulus), telling(stimulus)
    broken[4, 5, 6] = torch.inf
    seen = shown(stimulus, whole, broken)
    assert seen.reasons == {1: "activations are not finite"}
    assert set(seen.top) == set(seen.estimates) == {0}


def test_half_precision_is_added_up_in_single():
    stimulus = labelled(even)
    activations = telling(stimulus).bfloat16()
    seen = shown(stimulus, activations).estimates[0]
    rows, _ = fitted(stimulus, activations[..., :-2])
    assert seen["kurtosis"].value == pytest.approx(np.median(oracle.kurtoses(rows)), rel=1e-4)


def test_a_single_sequence_has_no_standard_errors():
    stimulus = labelled(even)
    split = torch.full((64,), EVALUATION)
    split[0] = FIRST_HALF
    labels = dataclasses.replace(stimulus.labels, split=split)
    alone = dataclasses.replace(stimulus, labels=labels)
    for told in shown(alone, telling(stimulus)).estimates[0].values():
        assert np.isnan(told.stderr)


def test_a_layer_whose_neurons_are_all_dead_or_constant_has_no_top_neurons():
    stimulus = labelled(even)
    zeros = torch.zeros(*stimulus.tokens.shape, 20)
    seen = shown(stimulus, zeros, zeros + 0.1)
    assert [len(seen.top[layer].neuron) for layer in (0, 1)] == [0, 0]
    assert seen.estimates[0]["dead_share"].value == 1
    assert seen.estimates[1]["dead_share"].value == 0
    assert np.isnan(seen.estimates[1]["kurtosis"].value)


def test_of_too_few_tokens_nothing_is_said():
    def rare(tokens, random):
        sides = np.zeros_like(tokens)
        sides[:, 5] = -1
        sides[:7, 5] = 1
        return sides

    stimulus = labelled(even, rare, counting=1.0)
    seen = shown(stimulus, telling(stimulus))
    assert seen.enough == (True, False)
    assert set(seen.top[0].concept.tolist()) == {0}
    assert np.isnan(seen.estimates[0]["polysemantic_share"].value)


def test_memory_does_not_grow_with_the_tokens():
    sizes = []
    for batch in (64, 256):
        stimulus = labelled(even, batch=batch)
        collector = NeuronsCollector(parts_of(1), stimulus)
        activations = telling(stimulus)
        for chunk in chunks(stimulus, FIRST_HALF, 5):
            collector.see("mlp_post", 0, activations[chunk.row, chunk.position], chunk)
        held = vars(collector._sums[0]).values()
        sizes.append(sum(each.numel() for each in held if isinstance(each, torch.Tensor)))
    assert sizes[0] == sizes[1]
