"""What is told of single neurons: planted ones get their labels and the tokens that they are active
on, and labels that mean nothing name none more often than they say.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from monitor.evidence import Evidence
from monitor.labels import EVALUATION
from monitor.probes.top_neurons import compute
from monitor.query import decoded
from tests.models import AttentionOnly
from tests.models.planted_neurons import BOTH, EVEN, PAIRED, even, paired, planted_neurons
from tests.monitor.features import test_neurons as collecting
from tests.monitor.probes.test_neurons import bits_stimulus, evidence, seen_as


def rows(told: dict) -> list[dict]:
    return [dict(zip(told, row, strict=True)) for row in zip(*told.values(), strict=True)]


def of_activations(stimulus, *layers) -> list[dict]:
    return rows(compute(seen_as(stimulus, {"neurons": collecting.shown(stimulus, *layers)})))


def test_planted_neurons_get_their_labels():
    told = rows(compute(evidence(planted_neurons(), bits_stimulus(even, paired))))
    by_neuron = {row["neuron"]: row for row in told}
    assert [row["neuron"] for row in told][:3] == sorted(
        [EVEN, PAIRED, BOTH], key=[row["neuron"] for row in told].index
    )
    for neuron, name in ((EVEN, "even"), (PAIRED, "paired")):
        assert by_neuron[neuron]["label"] == by_neuron[neuron]["concept"] == name
        assert by_neuron[neuron]["auc"] == pytest.approx(1.0, abs=1e-3)
        assert by_neuron[neuron]["score"] == pytest.approx(2.0, abs=0.01)
    assert by_neuron[BOTH]["label"] in {"even", "paired"}
    # Active on half of the tokens with it, and never on others.
    assert by_neuron[BOTH]["auc"] == pytest.approx(0.75, abs=0.03)
    for context in by_neuron[BOTH]["contexts"].split(" | "):
        token = int(context.partition("[")[2].partition("]")[0])
        assert even(torch.tensor(token)) == paired(torch.tensor(token)) == 1


def test_errors_leave_out_whole_sources():
    stimulus = collecting.labelled(collecting.even, collecting.small, batch=64)
    activations = collecting.telling(stimulus)
    labels = dataclasses.replace(stimulus.labels, source=torch.arange(64) // 8)
    grouped = dataclasses.replace(stimulus, labels=labels)
    held = collecting.shown(grouped, activations).top[0].counts.sum((-2, -1)) > 0
    assert (held.sum(-1) == 8).all()
    for given, n in ((stimulus, 32), (grouped, 8)):
        assert {row["n"] for row in of_activations(given, activations)} == {n}


def test_areas_are_those_of_the_other_sequences():
    stimulus = collecting.labelled(collecting.even, collecting.small, shortest=20)
    activations = collecting.telling(stimulus)
    told = of_activations(stimulus, activations)
    labels = stimulus.labels
    used = labels.used & (labels.split == EVALUATION)[:, None]
    for row in told:
        name = row["concept"].removeprefix("not ")
        values = labels.values[labels.names.index(name)][used]
        active = activations[..., row["neuron"]][used][values != 0]
        area = roc_auc_score((values[values != 0] > 0).numpy(), active.numpy())
        expected = 1 - area if row["concept"].startswith("not ") else area
        # Squared ReLUs are skewed: of what falls into one bin a pair counts half.
        assert expected - 0.02 < row["auc"] < expected + 0.005
    assert [row["score"] for row in told] == sorted((row["score"] for row in told), reverse=True)


def test_a_neuron_that_is_on_without_the_concept_is_said_to_be():
    stimulus = bits_stimulus(even)
    off = (stimulus.tokens % 2).float()[..., None] + 0.1 * collecting.noise(stimulus, 1)
    (row,) = of_activations(stimulus, off)
    assert row["label"] == row["concept"] == "not even"
    assert row["auc"] == pytest.approx(1.0)


def test_labels_that_mean_nothing_name_no_neuron():
    """The impostor: in a hundred layers of noise, the best neurons of each for labels at random and
    for whole sequences at random.
    """
    named, claimed = 0, []
    for seed in range(100):
        stimulus = collecting.labelled(
            collecting.at_random, collecting.of_sequences, batch=32, seed=seed
        )
        random = torch.Generator().manual_seed(seed)
        own = torch.randn(32, 1, 100, generator=random)
        told = of_activations(stimulus, 0.7 * own + collecting.noise(stimulus, 100, seed))
        named += sum(row["label"] != "" for row in told)
        claimed += [row["auc"] for row in told]
    assert len(claimed) == 800
    # Three standard deviations: one in 740 of those that were selective when chosen.
    assert named <= 3
    assert abs(np.mean(claimed) - 0.5) < 0.01


def test_the_null_of_a_score_is_what_the_best_of_noise_have():
    scores, nulls = [], []
    for seed in range(20):
        stimulus = collecting.labelled(collecting.at_random, collecting.at_random, seed=seed)
        told = of_activations(stimulus, collecting.noise(stimulus, 300, seed))
        scores.append([row["score"] for row in told])
        nulls.append([row["score_null"] for row in told])
    np.testing.assert_allclose(np.mean(nulls, 0), np.mean(scores, 0), rtol=0.05)


def test_without_concepts_those_of_the_largest_kurtosis_are_told():
    stimulus = collecting.labelled()
    activations = collecting.noise(stimulus, 30)
    activations[..., 4] = activations[..., 4] ** 5
    activations[..., 9] = activations[..., 9] ** 3
    told = of_activations(stimulus, activations)
    assert [row["neuron"] for row in told][:2] == [4, 9]
    for row in told:
        assert row["validity"] == "ok"
        assert row["label"] == row["concept"] == ""
        assert row["score"] is row["auc"] is row["auc_null"] is None
        assert row["kurtosis"] > 1
        assert row["contexts"].count("[") == 5


def test_layers_without_neurons_say_why():
    told = rows(compute(evidence(AttentionOnly(), bits_stimulus(even, vocabulary=64))))
    assert [(row["layer"], row["neuron"]) for row in told] == [(0, -1), (1, -1)]
    assert all(row["validity"].startswith("no neurons: ") for row in told)


def test_layers_in_which_no_neuron_varies_say_so():
    stimulus = bits_stimulus(even)
    (row,) = of_activations(stimulus, torch.zeros(*stimulus.tokens.shape, 12))
    assert row["validity"] == "no neuron varies"


def test_nothing_to_look_at_is_said():
    assert "pass text=" in compute(Evidence(observations={}))["validity"][0]


def test_contexts_can_be_read():
    told = compute(evidence(planted_neurons(), bits_stimulus(even)))
    frame = pd.DataFrame({"contexts": told["contexts"]}, index=range(5, 5 + len(told["n"])))
    texts = decoded(frame["contexts"], lambda ids: "".join(f"<{token}>\n" for token in ids))
    assert texts.index.equals(frame.index)
    before, token, _ = frame["contexts"].iloc[0].split(" | ")[0].replace("]", "[").split("[")
    expected = "".join(f"<{word}>\\n" for word in before.split()) + f"[<{token}>\\n]"
    assert texts.iloc[0].startswith(expected)
