"""What is told of whole layers: planted neurons are counted, of labels that mean nothing none is
selective for more than chance allows, and in a turned basis neurons tell what any direction does.
"""

import numpy as np
import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation
from monitor.evidence import Evidence
from monitor.features import COLLECTORS, collect
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import find_parts
from monitor.probes.neurons import SPEC, compute
from monitor.stimuli import Stimulus, labelled_stimulus
from tests.models import AttentionOnly, gpt2
from tests.models.planted_neurons import NEVER, even, paired, planted_neurons
from tests.monitor.features import test_neurons as collecting
from tests.oracles import neurons as oracle

VOCABULARY = 96
SEQUENCES, POSITIONS = 64, 33


def bits_stimulus(*concepts, seed: int = 0, vocabulary: int = VOCABULARY) -> Stimulus:
    """Random tokens, labelled by functions of ids."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (SEQUENCES, POSITIONS), generator=random)
    values = [of(tokens).to(torch.int8) for of in concepts]
    labels = Labels(
        names=tuple(of.__name__ for of in concepts),
        values=torch.stack(values) if values else torch.zeros(0, *tokens.shape, dtype=torch.int8),
        split=torch.tensor([FIRST_HALF, SECOND_HALF, EVALUATION, EVALUATION] * (SEQUENCES // 4)),
        length=torch.full((SEQUENCES,), POSITIONS),
        source=torch.arange(SEQUENCES),
    )
    return labelled_stimulus("concepts", tokens, labels)


def evidence(model, stimulus: Stimulus) -> Evidence:
    parts = find_parts(find_language_model(model))
    features, reasons = collect(parts, stimulus, {"neurons": COLLECTORS["neurons"]})
    return seen_as(stimulus, features, reasons)


def seen_as(stimulus, features, reasons=None) -> Evidence:
    observation = Observation(
        stimulus=stimulus, vocab_size=VOCABULARY, features=features, reasons=reasons or {}
    )
    return Evidence(observations={"concepts": observation})


def of_activations(stimulus: Stimulus, *layers: torch.Tensor) -> dict:
    return compute(seen_as(stimulus, {"neurons": collecting.shown(stimulus, *layers)}))


def test_planted_neurons_are_counted():
    told = compute(evidence(planted_neurons(), bits_stimulus(even, paired)))
    assert told["validity"] == ["ok"]
    assert told["n"] == [SEQUENCES // 2]
    living = 39
    assert told["dead_share"] == pytest.approx([1 / 40])
    # Of the others some tell a concept by the tokens that they happen to be active on.
    assert told["polysemantic_share"][0] >= 1 / living - 1e-6
    assert 3 / living - 1e-6 <= told["selective_share"][0] <= 6 / living
    assert told["concepts_per_neuron"][0] >= 4 / living - 1e-6
    assert told["concepts_per_neuron_null"][0] <= 0.02


def test_a_neuron_that_is_always_on_or_off_has_the_least_kurtosis():
    stimulus = bits_stimulus(even)
    on = (stimulus.tokens % 2 == 0).float()[..., None]
    rare = (stimulus.tokens == 7).float()[..., None]
    told = of_activations(stimulus, on.expand(-1, -1, 5), rare.expand(-1, -1, 5))
    share = rare[(stimulus.labels.split != EVALUATION)[:, None] & stimulus.labels.used].mean()
    expected = 1 / share + 1 / (1 - share) - 3
    assert told["kurtosis"] == pytest.approx([1.0, float(expected)], rel=1e-2)


def test_of_noise_as_many_are_selective_as_the_null_says():
    """Labels that mean nothing, of as many concepts as there may be, and one with the tokens of a
    sequence alike: in a hundred layers no more than the stated share.
    """
    counts, nulls = [], []
    for seed in range(25):
        stimulus = collecting.labelled(
            collecting.at_random, collecting.at_random, collecting.of_sequences, seed=seed
        )
        layers = [collecting.noise(stimulus, 200, seed=4 * seed + layer) for layer in range(4)]
        told = of_activations(stimulus, *layers)
        counts += told["concepts_per_neuron"]
        nulls += told["concepts_per_neuron_null"]
    assert np.mean(counts) <= 3 * 0.01
    assert np.mean(nulls) <= 3 * 0.01


def test_a_null_is_what_chance_makes_of_few_sequences():
    """Where sequences are alike within themselves the threshold is that of chance, and the null is
    what it says: one in a hundred.
    """
    counts, nulls = [], []
    for seed in range(60):
        stimulus = collecting.labelled(collecting.of_sequences, batch=32, seed=seed)
        random = torch.Generator().manual_seed(seed)
        own = torch.randn(32, 1, 300, generator=random)
        told = of_activations(stimulus, own + 0.3 * collecting.noise(stimulus, 300, seed))
        counts += told["concepts_per_neuron"]
        nulls += told["concepts_per_neuron_null"]
    assert 0.003 < np.mean(nulls) < 0.03
    assert 0.003 < np.mean(counts) < 0.03


def basis_of_concepts(stimulus: Stimulus, neurons: int = 64) -> torch.Tensor:
    """Every fourth neuron is one concept, beside noise as large as it in every neuron."""
    rows = collecting.noise(stimulus, neurons)
    sides = stimulus.labels.values.float().movedim(0, -1)
    for neuron in range(0, neurons, 4):
        rows[..., neuron] += 2 * sides[..., (neuron // 4) % sides.shape[-1]]
    return rows


def test_in_a_turned_basis_neurons_tell_what_directions_do():
    """The impostor: the same information, and no neuron that stands out."""
    stimulus = bits_stimulus(even, paired)
    rows = basis_of_concepts(stimulus)
    random = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=random)).Q
    told = of_activations(stimulus, rows, rows @ turn)
    share, null = told["selective_share"], told["selective_share_null"]
    several, several_null = told["polysemantic_share"], told["polysemantic_share_null"]
    assert share[0] == pytest.approx(16 / 64)
    assert several[0] == 0
    # Mixtures tell of both.
    assert several_null[0] > 0.1
    spread = (null[1] * (1 - null[1]) / 64 * 2) ** 0.5
    assert abs(share[1] - null[1]) < 3 * spread
    assert abs(several[1] - several_null[1]) < 0.25
    assert told["concepts_per_neuron"][1] == pytest.approx(
        told["concepts_per_direction"][1], abs=0.35
    )


def test_kurtosis_of_a_turned_basis_is_that_of_directions():
    stimulus = bits_stimulus(even)
    rows = collecting.noise(stimulus, 200).relu().square()
    random = torch.Generator().manual_seed(5)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=random)).Q
    told = of_activations(stimulus, rows, rows @ turn)
    assert told["kurtosis"][0] > 3 * told["kurtosis_null"][0]
    assert told["kurtosis"][1] == pytest.approx(told["kurtosis_null"][1], rel=0.1)


def test_class_selectivity_is_missing_where_activations_can_be_negative():
    stimulus = bits_stimulus(even, paired)
    rows = collecting.noise(stimulus, 30)
    told = of_activations(stimulus, rows, rows.relu())
    assert told["class_selectivity"][0] is None
    assert told["validity"] == ["ok", "ok"]
    # Of noise what there is comes of the largest of a few means, as in the null.
    assert told["class_selectivity"][1] == pytest.approx(
        told["class_selectivity_null"][1], rel=0.35
    )


def test_class_selectivity_of_planted_classes():
    def odd(tokens):
        return -even(tokens)

    stimulus = bits_stimulus(even, odd)
    on = (stimulus.tokens % 2 == 0).float()[..., None]
    told = of_activations(stimulus, torch.cat([on, 1 - on, 3 + on, on * 0], dim=-1))
    labels = stimulus.labels
    rows, values = collecting.fitted(stimulus, torch.cat([on, 1 - on, 3 + on], dim=-1))
    assert oracle.class_selectivity(rows, values) == pytest.approx((1 + 1 + 1 / 7) / 3)
    assert told["class_selectivity"][0] == pytest.approx((1 + 1 + 1 / 7) / 3, rel=1e-4)
    assert labels.names == ("even", "odd")


def test_without_concepts_the_rest_is_told():
    told = compute(evidence(planted_neurons(), bits_stimulus()))
    assert told["validity"] == ["ok"]
    for field in SPEC.fields:
        there = field.name in {"dead_share", "kurtosis"}
        assert (told[field.name][0] is not None) == there, field.name
    assert told["dead_share"] == pytest.approx([1 / 40])


def test_smooth_neurons_that_are_never_on_are_dead():
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[:10] = -50
    told = compute(evidence(model, bits_stimulus(even, vocabulary=48)))
    assert told["dead_share"] == pytest.approx([0, 10 / 128])


def test_layers_without_neurons_say_why():
    told = compute(evidence(AttentionOnly(), bits_stimulus(even, vocabulary=64)))
    assert told["layer"] == [0, 1]
    assert all(why.startswith("no neurons: ") for why in told["validity"])
    assert told["kurtosis"] == [None, None]


def test_nothing_to_look_at_is_said():
    assert "pass text=" in compute(Evidence(observations={}))["validity"][0]


def test_dead_is_the_planted_one():
    stimulus = bits_stimulus(even)
    seen = evidence(planted_neurons(), stimulus).observations["concepts"].features["neurons"]
    assert NEVER not in seen.top[0].neuron.tolist()
