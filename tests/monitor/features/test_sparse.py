"""What the sparse probing collector adds up: against all activations at once, scikit-learn, cuts
into other chunks, noise, activations of large mean and such that are not finite.
"""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from monitor.anatomy import find_language_model
from monitor.features import Chunk, Collector
from monitor.features.nested import discriminants
from monitor.features.scores import GROUPS
from monitor.features.sparse import CURVES, SIZES, SparseCollector
from monitor.features.tasks import control_labels
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF, Labels
from monitor.parts import Parts
from monitor.parts.blocks import Block
from monitor.probes.sparse_probing import f1
from monitor.stimuli import Stimulus, labelled_stimulus
from tests.models import AttentionOnly
from tests.oracles import sparse as oracle

POSITIONS = 33


def labelled(*concepts, batch=64, vocabulary=50, counting=0.8, seed=0) -> Stimulus:
    """Random tokens; a concept is a function from ids to sides (±1). Some tokens do not count."""
    random = np.random.default_rng(seed)
    tokens = random.integers(vocabulary, size=(batch, POSITIONS))
    values = np.stack([side(tokens, random) for side in concepts])
    values *= random.random(values.shape) < counting
    split = torch.tensor([FIRST_HALF, SECOND_HALF, EVALUATION, EVALUATION]).repeat(batch // 4)
    labels = Labels(
        names=tuple(f"concept {place}" for place in range(len(concepts))),
        values=torch.from_numpy(values.astype(np.int8)),
        split=split,
        length=torch.full((batch,), POSITIONS),
        source=torch.arange(batch),
    )
    return labelled_stimulus("concepts", torch.from_numpy(tokens), labels)


def even(tokens, random):
    return 1 - 2 * (tokens % 2)


def at_random(tokens, random):
    return random.choice([-1, 1], size=tokens.shape)


def parts_of(layers: int) -> Parts:
    model = find_language_model(AttentionOnly())
    blocks = tuple(Block(layer=layer, path=str(layer), taps={}) for layer in range(layers))
    return Parts(model=model, blocks=blocks, taps={})


def chunks(stimulus: Stimulus, split: int, at_once: int = 5):
    """As a pass makes them."""
    labels = stimulus.labels
    for rows in (labels.split == split).nonzero().flatten().split(at_once):
        local, position = labels.used[rows].nonzero(as_tuple=True)
        ids = stimulus.tokens[rows][local, position]
        yield Chunk(split=split, row=rows[local], position=position, ids=ids)


def shown(stimulus: Stimulus, activations: list[torch.Tensor], at_once: int = 5):
    """What is collected of layers with these `activations` [batch, position, neuron]."""
    collector = SparseCollector(parts_of(len(activations)), stimulus)
    assert isinstance(collector, Collector)
    with torch.no_grad():
        for split in (FIRST_HALF, SECOND_HALF, EVALUATION):
            for chunk in chunks(stimulus, split, at_once):
                for layer, rows in enumerate(activations):
                    seen = rows[chunk.row, chunk.position]
                    collector.see("mlp_post", layer, seen, chunk)
            collector.turn(split)
    return collector.collected()


def noise(stimulus: Stimulus, neurons: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*stimulus.tokens.shape, neurons, generator=random)


def telling(stimulus: Stimulus, neurons: int, strength: float, seed: int = 0) -> torch.Tensor:
    """Correlated activations, some of which tell of the first concept; the last one is dead."""
    random = torch.Generator().manual_seed(seed + 1)
    mixed = noise(stimulus, neurons, seed) @ torch.randn(neurons, neurons, generator=random)
    side = stimulus.labels.values[0].float()[..., None]
    rows = mixed + side * strength * torch.randn(neurons, generator=random)
    scales = torch.logspace(-3, 2, neurons)
    rows = rows * scales[torch.randperm(neurons, generator=random)]
    rows[..., -1] = 0
    return rows


def split_of(stimulus: Stimulus, activations: torch.Tensor, values: torch.Tensor, split: int):
    """Rows and sides of the tokens that count, in float64."""
    labels = stimulus.labels
    counting = (values != 0) & labels.used & (labels.split == split)[:, None]
    return activations[counting].double().numpy(), (values[counting] > 0).numpy()


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_against_all_activations_at_once(mean):
    stimulus = labelled(even, at_random)
    activations = telling(stimulus, 45, strength=2.0)
    # A mean that is a thousand standard deviations of each neuron, or none.
    activations += mean * activations.std((0, 1))
    sparse = shown(stimulus, [activations])
    tasks = {"best": stimulus.labels.values, "control": control_labels(stimulus)}
    for curve, labels in tasks.items():
        for concept, values in enumerate(labels):
            first, second, last = (
                split_of(stimulus, activations, values, s)
                for s in (FIRST_HALF, SECOND_HALF, EVALUATION)
            )
            for place, k in enumerate(SIZES[:6]):
                said = oracle.discriminant(*second, oracle.best(*first, k))(last[0])
                expected = oracle.f1(said, last[1])
                value, _ = f1(sparse.answers[0, concept, CURVES.index(curve), place])
                # Rounding moves single tokens over the threshold.
                assert value.item() == pytest.approx(expected, abs=2e-3 if mean else 1e-3)
    assert sparse.largest.tolist() == [[32, 32]]
    assert not sparse.lost.any()


def test_discriminants_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    sides = random.random(400) < 0.4
    rows = random.normal(size=(400, 24)) @ random.normal(size=(24, 24))
    rows += sides[:, None] * random.normal(size=24)
    centred = rows - np.where(sides[:, None], rows[sides].mean(0), rows[~sides].mean(0))
    fitted = discriminants(
        torch.from_numpy(centred.T @ centred / 400),
        torch.from_numpy(rows[sides].mean(0) - rows[~sides].mean(0)),
        sizes=(1, 2, 8, 16),
        tokens=torch.tensor(400.0, dtype=torch.float64),
    )
    for weights, k in zip(fitted.numpy(), (1, 2, 8, 16), strict=True):
        shrunk = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=k / (400 + k))
        shrunk.fit(rows[:, :k] / centred[:, :k].std(0), sides)
        np.testing.assert_allclose(
            weights[:k], shrunk.coef_[0] / centred[:, :k].std(0), rtol=1e-6, atol=1e-9
        )
        assert not weights[k:].any()


def test_it_tells_as_much_as_logistic_regression_does():
    stimulus = labelled(even)
    activations = telling(stimulus, 40, strength=1.0)
    sparse = shown(stimulus, [activations])
    values = stimulus.labels.values[0]
    first, second, last = (
        split_of(stimulus, activations, values, s) for s in (FIRST_HALF, SECOND_HALF, EVALUATION)
    )
    differences = []
    for place, k in enumerate(SIZES[:6]):
        chosen = oracle.best(*first, k)
        scale = second[0][:, chosen].std(0)
        logistic = LogisticRegression(C=1.0, max_iter=2000)
        logistic.fit(second[0][:, chosen] / scale, second[1])
        expected = f1_score(last[1], logistic.predict(last[0][:, chosen] / scale))
        value, stderr = f1(sparse.answers[0, 0, 0, place])
        assert 0.55 < expected < 0.999
        differences.append(abs(value.item() - expected) / stderr.item())
    # Of the same tokens, and so much less than the error.
    assert max(differences) < 1.5, differences


def test_f1_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    scores, group = random.normal(size=600), random.integers(16, size=600)
    having = scores + random.normal(size=600) > 0.7
    answers = torch.zeros(16, 2, 2, dtype=torch.int64)
    for g, has, said in zip(group, having, scores > 0, strict=True):
        answers[g, int(not has), int(not said)] += 1
    value, _ = f1(answers)
    weight = np.where(having, 1 / having.sum(), 1 / (~having).sum())
    assert value.item() == pytest.approx(f1_score(having, scores > 0, sample_weight=weight))
    assert value.item() == pytest.approx(oracle.f1(scores > 0, having))
    # On as many tokens of each side it is the plain one.
    few = np.flatnonzero(having)
    chosen = np.concatenate([few, np.flatnonzero(~having)[: len(few)]])
    answers = torch.zeros(16, 2, 2, dtype=torch.int64)
    for g, has, said in zip(group[chosen], having[chosen], scores[chosen] > 0, strict=True):
        answers[g, int(not has), int(not said)] += 1
    plain = f1_score(having[chosen], scores[chosen] > 0)
    assert f1(answers)[0].item() == pytest.approx(plain, abs=1e-6)


def test_saying_always_yes_has_two_thirds():
    answers = torch.zeros(4, 2, 2, dtype=torch.int64)
    answers[..., 0] = torch.randint(5, 9, (4, 2), generator=torch.Generator().manual_seed(0))
    assert f1(answers)[0].item() == pytest.approx(2 / 3)
    assert f1(answers)[1].item() == pytest.approx(0)


def test_how_sequences_are_cut_into_passes_changes_nothing():
    stimulus = labelled(even, at_random)
    activations = [telling(stimulus, 20, strength=1.0, seed=s) for s in (0, 1)]
    one, other = shown(stimulus, activations, at_once=1), shown(stimulus, activations, at_once=64)
    # What is added up in another order may move a token over the threshold.
    assert (one.answers - other.answers).abs().sum() <= 1e-3 * one.answers.sum()
    assert torch.equal(one.answers.sum(-1), other.answers.sum(-1))
    again = shown(stimulus, activations, at_once=1)
    assert torch.equal(again.answers, one.answers)


def test_it_is_asked_of_every_held_out_token_and_of_no_other():
    stimulus = labelled(even, at_random, counting=0.5)
    sparse = shown(stimulus, [noise(stimulus, 64)])
    labels = stimulus.labels
    counting = (labels.values != 0) & labels.used & (labels.split == EVALUATION)[:, None]
    for concept in range(2):
        for curve, draws in (("best", 1), ("control", 1), ("random", 8)):
            asked = sparse.answers[0, concept, CURVES.index(curve), 0]
            assert asked.sum() == draws * counting[concept].sum()
    having = counting[0] & (labels.values[0] > 0)
    assert sparse.answers[0, 0, 0, 0, :, 0].sum() == having.sum()


def test_groups_are_of_whole_sources():
    stimulus = labelled(even, counting=0.5)
    labels = dataclasses.replace(stimulus.labels, source=torch.arange(64) // 8)
    grouped = dataclasses.replace(stimulus, labels=labels)
    activations = [noise(stimulus, 64)]
    alone, together = (shown(one, activations) for one in (stimulus, grouped))
    by_source = together.answers[0, 0, 0, 0]
    assert by_source.sum((-2, -1)).gt(0).tolist() == [True] * 8 + [False] * (GROUPS - 8)
    assert torch.equal(by_source.sum(0), alone.answers[0, 0, 0, 0].sum(0))
    assert [alone.sources.tolist(), together.sources.tolist()] == [[32], [8]]


def test_noise_is_told_of_only_where_the_same_tokens_chose_and_evaluate():
    """Why there are three sets of sequences: one does for all, with noise and random labels, what
    looks like knowledge.
    """
    stimulus = labelled(at_random, batch=32)
    ours, cheating = [], []
    for seed in range(8):
        activations = noise(stimulus, 512, seed)
        value, _ = f1(shown(stimulus, [activations]).answers[0, 0, 0, 4])
        ours.append(value.item())
        rows, sides = split_of(stimulus, activations, stimulus.labels.values[0], EVALUATION)
        said = oracle.discriminant(rows, sides, oracle.best(rows, sides, 16))(rows)
        cheating.append(oracle.f1(said, sides))
    assert np.mean(cheating) > 0.62
    assert abs(np.mean(ours) - 0.5) < 4 * np.std(ours, ddof=1) / 8**0.5 + 0.005


def test_random_neurons_have_several_draws():
    """One neuron of 64 tells all; of 8 random ones about one in eight is that one, or none."""
    stimulus = labelled(even)
    activations = noise(stimulus, 64)
    activations[..., 7] = stimulus.labels.values[0]
    sparse = shown(stimulus, [activations])
    by_curve, _ = f1(sparse.answers[0, 0])
    assert by_curve[CURVES.index("best"), 0] == 1
    assert by_curve[CURVES.index("random"), 0] < 0.65
    # All 64 neurons are in both.
    assert by_curve[CURVES.index("random"), 6] == by_curve[CURVES.index("best"), 6] == 1


def test_in_bfloat16():
    stimulus = labelled(even)
    activations = telling(stimulus, 40, strength=1.0)
    whole, _ = f1(shown(stimulus, [activations]).answers[0, 0, 0, :6])
    rough, _ = f1(shown(stimulus, [activations.bfloat16()]).answers[0, 0, 0, :6])
    assert (whole - rough).abs().max() < 0.02


@pytest.mark.parametrize("split", [FIRST_HALF, SECOND_HALF, EVALUATION])
def test_what_is_not_finite_is_said(split):
    stimulus = labelled(even)
    activations = noise(stimulus, 16)
    row = int((stimulus.labels.split == split).nonzero()[0])
    activations[row, :, 5] = float("inf")
    sparse = shown(stimulus, [activations, noise(stimulus, 16)])
    # Of all 16 neurons it is one.
    assert sparse.lost[0, 0, :, 4].all()
    assert not sparse.lost[1].any()


def test_few_tokens_allow_few_neurons():
    stimulus = labelled(even, at_random, batch=64)
    values = stimulus.labels.values.clone()
    second = (stimulus.labels.split == SECOND_HALF).nonzero().flatten()
    # 40 tokens of either side to fit on.
    values[0, second] = 0
    values[0, second[:10], 1:9] = torch.tensor([1, -1] * 4, dtype=torch.int8)
    values[1, second] = 0
    values[1, second[:2], 1:7] = torch.tensor([1, -1] * 3, dtype=torch.int8)
    labels = dataclasses.replace(stimulus.labels, values=values)
    few = labelled_stimulus("concepts", stimulus.tokens, labels)
    sparse = shown(few, [noise(few, 64)])
    assert sparse.tokens[0, :, SECOND_HALF].tolist() == [[40, 40], [6, 6]]
    assert sparse.largest.tolist() == [[16, 0]]


def test_covariances_stay_within_their_memory():
    few = labelled(*[at_random] * 20, batch=256)
    collector = SparseCollector(parts_of(12), few)
    assert collector._most == 128
    assert 12 * 20 * 3 * 4 * collector._most**2 < 50e6
    collector = SparseCollector(parts_of(1), labelled(even, batch=256))
    assert collector._most == 256


def test_memory_does_not_grow_with_tokens():
    def held(batch: int) -> list[int]:
        stimulus = labelled(even, at_random, batch=batch)
        activations = noise(stimulus, 32)
        collector = SparseCollector(parts_of(1), stimulus)
        kept = []
        for split, stage in (
            (FIRST_HALF, "_ranked"),
            (SECOND_HALF, "_fitted"),
            (EVALUATION, "_asked"),
        ):
            for chunk in chunks(stimulus, split):
                seen = activations[chunk.row, chunk.position]
                collector.see("mlp_post", 0, seen, chunk)
            its = vars(getattr(collector, stage)[0]).values()
            kept.append(sum(t.numel() for t in its if isinstance(t, torch.Tensor)))
            collector.turn(split)
        return kept

    assert held(64) == held(256)


def test_neurons_that_fall_silent_after_they_were_chosen():
    """Their variance in the second half is what rounding leaves of 0, negative perhaps."""
    stimulus = labelled(even, batch=128)
    random = torch.Generator().manual_seed(0)
    activations = noise(stimulus, 64)
    activations[..., ::2] += torch.randn(32, generator=random) * 1000
    silent = stimulus.labels.split == SECOND_HALF
    activations[silent, :, :16] = activations[0, 1, :16]
    sparse = shown(stimulus, [activations])
    assert not sparse.lost.any()


def test_constant_neurons_are_not_chosen():
    stimulus = labelled(even)
    activations = noise(stimulus, 24)
    activations[..., 4:] = torch.arange(20.0)
    sparse = shown(stimulus, [activations])
    assert not sparse.lost.any()
    four, all_of_them = f1(sparse.answers[0, 0, 0, [2, 4]])[0]
    assert four.item() == pytest.approx(all_of_them.item(), abs=2e-3)
