"""`grokking`: known answers of waves that were planted, every number against its definition, and
what looks like grokking and is not: what was learned by heart, waves of something else, wrong
frequencies, a model before training.
"""

import dataclasses
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from monitor.measure import measure
from monitor.probes.grokking import gini, key_frequencies, norms
from monitor.tasks import ModularAddition, Task
from tests.models import Bigram
from tests.models.sums import (
    AnswerOnly,
    LooksUp,
    ShortTransformer,
    every_pair,
    memorised_logits,
    random_pairs,
    wave_logits,
)
from tests.oracles import grokking as oracle

KEYS = [14, 35, 41, 42, 52]
FULL, EXCLUDED, GINI = 2.179e-5, 4.727388, 0.910714


def told(model, task) -> pd.Series:
    return measure(model, probes=["grokking"], task=task)["grokking"].iloc[0]


@pytest.fixture(scope="module")
def analytic():
    model = LooksUp(wave_logits(113, KEYS, 5.0))
    wrong = ModularAddition(113, train=random_pairs(113), keys=[1, 2, 3, 4, 5])
    return told(model, wrong)


def test_analytic_logits(analytic):
    """What the five waves of Nanda et al. give, at p = 113."""
    assert analytic["key_frequencies"].tolist() == KEYS
    for field in ("full_loss", "restricted_loss", "train_loss", "held_out_loss"):
        assert analytic[field] == pytest.approx(FULL, rel=1e-3), field
        assert analytic[f"{field}_stderr"] == pytest.approx(0, abs=1e-9)
    assert analytic["excluded_loss"] == pytest.approx(EXCLUDED, abs=1e-6)
    assert math.log(113) == pytest.approx(EXCLUDED, abs=1e-6)
    assert analytic["gini_logits"] == pytest.approx(GINI, abs=1e-6)
    assert analytic["full_accuracy"] == 1
    assert analytic["loss_gap"] == pytest.approx(0, abs=1e-9)


def test_wrong_frequencies_change_nothing(analytic):
    """Neither those named, of which none is key, nor as many at random."""
    for kind in ("_named", "_null"):
        assert analytic[f"restricted_loss{kind}"] == pytest.approx(math.log(113), abs=1e-6)
        assert analytic[f"excluded_loss{kind}"] == pytest.approx(FULL, rel=1e-3)
    for loss in ("restricted", "excluded"):
        assert analytic[f"{loss}_loss_null_sd"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("p", [7, 8, 11])
def test_every_number_by_its_definition(p):
    """Random logits with waves in them, so that there are key frequencies; also an even modulus,
    whose last frequency has no sine.
    """
    logits = oracle.random_logits(p) + wave_logits(p, [2], 6.0)
    pairs = random_pairs(p, 0.5)
    row = told(LooksUp(logits), ModularAddition(p, train=pairs, keys=[1, p // 2]))
    train = sorted((pairs @ torch.tensor([p, 1])).tolist())
    held_out = [q for q in range(p * p) if q not in train]
    keys = [int(k) for k in row["key_frequencies"]]
    spectrum = oracle.norms(logits)
    power = torch.tensor(spectrum).square()
    over = (power > 5 * power.quantile(0.5)) & (power > power.max() / 50)
    assert keys == [2] == (1 + over.nonzero().flatten()).tolist()
    rows = logits.numpy()
    expected = {
        "train_loss": oracle.loss(rows, train),
        "held_out_loss": oracle.loss(rows, held_out),
        "full_loss": oracle.loss(rows, list(range(p * p))),
        "restricted_loss": oracle.restricted_loss(logits, keys),
        "excluded_loss": oracle.excluded_loss(logits, keys, train),
        "restricted_loss_named": oracle.restricted_loss(logits, [1, p // 2]),
        "excluded_loss_named": oracle.excluded_loss(logits, [1, p // 2], train),
        "gini_logits": oracle.gini(spectrum),
    }
    assert row[list(expected)].astype(float).to_dict() == pytest.approx(expected, rel=1e-5)
    assert row["spectrum"].tolist() == pytest.approx(spectrum, rel=1e-5)
    right = (logits.argmax(1) == every_pair(p).sum(1) % p).double()
    assert row["train_accuracy"] == pytest.approx(right[train].mean().item())
    assert row["held_out_accuracy"] == pytest.approx(right[held_out].mean().item())
    assert row["accuracy_gap"] == pytest.approx(row["train_accuracy"] - row["held_out_accuracy"])
    assert row["loss_gap"] == pytest.approx(row["held_out_loss"] - row["train_loss"], rel=1e-5)


def test_errors_are_those_of_pairs_and_of_sums():
    p, pairs = 11, random_pairs(11, 0.5)
    logits = oracle.random_logits(p) + wave_logits(p, [2], 6.0)
    row = told(LooksUp(logits), ModularAddition(p, train=pairs))
    train = (pairs @ torch.tensor([p, 1])).tolist()
    keys = [int(k) for k in row["key_frequencies"]]
    wave = torch.from_numpy(oracle.component(logits, keys))
    for field, rows, questions in (
        ("restricted_loss", logits.mean(0) + wave, range(p * p)),
        ("excluded_loss", logits - wave, train),
    ):
        of_sum: dict = {}
        for question in questions:
            loss = oracle.loss(rows.numpy(), [question])
            of_sum.setdefault(sum(divmod(question, p)) % p, []).append(loss)
        error = row[f"{field}_stderr"]
        assert error == pytest.approx(oracle.clustered_stderr(of_sum), rel=1e-4), field
    losses = F.cross_entropy(logits[train], pairs.sum(1) % p, reduction="none")
    stderr = losses.std().item() / len(train) ** 0.5
    assert row["train_loss_stderr"] == pytest.approx(stderr, rel=1e-4)
    errors = [row[f"{part}_loss_stderr"] for part in ("train", "held_out")]
    assert row["loss_gap_stderr"] == pytest.approx(math.hypot(*errors), rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_learned_by_heart_has_no_waves(seed):
    """Its means over sums know the training answers too; no few frequencies stand out."""
    p, pairs = 59, random_pairs(59, seed=seed)
    task = ModularAddition(p, train=pairs, keys=[3, 9, 14, 20, 27])
    row = told(LooksUp(memorised_logits(p, pairs, seed=seed)), task)
    assert row["train_accuracy"] == 1
    assert row["held_out_accuracy"] < 0.05
    assert row["loss_gap"] > 10
    assert len(row["key_frequencies"]) == 0
    assert row["restricted_loss"] > math.log(p) - 0.05
    assert row["excluded_loss"] == pytest.approx(row["train_loss"], abs=1e-6)
    assert row["gini_logits"] < 0.15
    # As many frequencies, whichever they are, do lower the loss: no more than others do.
    named, null = row["restricted_loss_named"], row["restricted_loss_named_null"]
    assert named < math.log(p) - 0.5
    assert abs(named - null) < 4 * row["restricted_loss_named_null_sd"] + 0.1


def test_waves_of_something_else_are_none_of_the_sum():
    """Of a - b: wrong nearly everywhere, as sparse a spectrum as any, and not of the sums."""
    logits = wave_logits(113, KEYS, 5.0, minus=True)
    row = told(LooksUp(logits), ModularAddition(113, train=random_pairs(113), keys=KEYS))
    assert row["restricted_loss_named"] == pytest.approx(math.log(113), abs=1e-6)
    assert row["excluded_loss_named"] == pytest.approx(row["train_loss"], rel=1e-6)


def test_mirrored_pairs_alone_are_no_grokking():
    """Who knows a + b by heart and cannot tell it from b + a gets held-out pairs right."""
    p, pairs = 59, random_pairs(59)
    known = memorised_logits(p, torch.cat([pairs, pairs.flip(1)]))
    row = told(LooksUp(known), ModularAddition(p, train=pairs))
    assert row["held_out_accuracy"] > 0.3
    assert len(row["key_frequencies"]) == 0
    assert row["restricted_loss"] > math.log(p) - 0.05


@pytest.mark.parametrize("seed", range(5))
def test_before_training_there_is_nothing(seed):
    torch.manual_seed(seed)
    p = 59
    task = ModularAddition(p, train=random_pairs(p), sequence=("a", "b"))
    row = told(AnswerOnly(p), task)
    assert row["restricted_loss"] == pytest.approx(math.log(p), abs=0.15)
    assert row["train_loss"] == pytest.approx(math.log(p), abs=0.15)
    assert abs(row["loss_gap"]) < 4 * row["loss_gap_stderr"]
    assert abs(row["accuracy_gap"]) < 4 * row["accuracy_gap_stderr"] + 0.01
    for of in ("embedding", "unembedding"):
        gap = row[f"gini_{of}"] - row[f"gini_{of}_null"]
        assert abs(gap) < 5 * row[f"gini_{of}_null_sd"], of


def test_waves_in_both_ends_are_seen_and_their_order_matters():
    p = 59
    at = 2 * math.pi * torch.arange(p)[:, None] * torch.tensor([3, 3, 10, 10]) / p
    waves = torch.where(torch.arange(4) % 2 == 0, at.cos(), at.sin())
    model = ShortTransformer(p, width=4)
    with torch.no_grad():
        model.embedding.weight[:p] = waves
        model.unembedding.weight[:] = waves
    task = ModularAddition(p, train=random_pairs(p))
    row = told(model, task)
    for of in ("embedding", "unembedding"):
        expected = oracle.gini(oracle.norms_of_rows(waves))
        assert row[f"gini_{of}"] == pytest.approx(expected, abs=1e-5)
        assert expected == pytest.approx(1 - 2 / 29, abs=1e-4)
        assert row[f"gini_{of}"] > row[f"gini_{of}_null"] + 5 * row[f"gini_{of}_null_sd"]
    mixed = torch.randperm(p, generator=torch.Generator().manual_seed(0))
    assert gini(norms(waves[mixed])) < 0.5


@pytest.mark.parametrize("p", [8, 11])
def test_norms_of_rows(p):
    rows = torch.randn(p, 5, generator=torch.Generator().manual_seed(0))
    assert norms(rows).tolist() == pytest.approx(oracle.norms_of_rows(rows))


def test_gini():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert gini(values) == pytest.approx(oracle.gini(values.tolist()), rel=1e-5)
    assert gini(torch.zeros(4)) is None


@pytest.mark.parametrize("seed", range(20))
def test_at_most_half_of_all_frequencies_are_key(seed):
    """So that there are as many others at random, whatever the spectrum."""
    power = torch.randn(29, generator=torch.Generator().manual_seed(seed)).mul(3).exp()
    assert 0 < len(key_frequencies(power)) <= 14


def test_what_is_added_to_all_logits_of_a_pair_changes_nothing():
    logits = oracle.random_logits(11) + wave_logits(11, [2], 6.0)
    shifts = 30 * torch.randn(121, 1, generator=torch.Generator().manual_seed(0)).double()
    task = ModularAddition(11, train=random_pairs(11), keys=[3])
    plain, shifted = (told(LooksUp(each), task) for each in (logits, logits + shifts))
    numbers = [name for name in plain.index if "loss" in name or "gini_logits" in name]
    assert shifted[numbers].astype(float).to_dict() == pytest.approx(
        plain[numbers].astype(float).to_dict(), rel=1e-4, abs=1e-6
    )


def test_a_constant_model_has_no_spectrum_and_says_nothing_of_it():
    row = told(LooksUp(torch.zeros(121, 11).double()), ModularAddition(11, train=random_pairs(11)))
    assert pd.isna(row["gini_logits"])
    assert len(row["key_frequencies"]) == 0
    assert row["restricted_loss"] == row["excluded_loss"] == pytest.approx(math.log(11))
    assert row["validity"] == "ok"


def test_what_is_not_finite_is_not_interpretable():
    logits = wave_logits(11, [2], 5.0)
    logits[7] = float("nan")
    row = told(LooksUp(logits), ModularAddition(11, train=random_pairs(11)))
    assert "is not finite" in row["validity"]


def test_any_task_has_losses_and_a_gap_and_no_waves():
    torch.manual_seed(0)
    model, rows = Bigram(), torch.randint(64, (30, 20))
    row = told(model, Task(train=rows[:10], held_out=rows[10:], answer=5))
    with torch.no_grad():
        predicted = model(rows).double().log_softmax(-1)[:, 14:19]
    losses = -predicted.gather(2, rows[:, 15:, None]).mean((1, 2))
    right = (predicted.argmax(-1) == rows[:, 15:]).double().mean(1)
    for part, some in (("train", slice(10)), ("held_out", slice(10, None))):
        assert row[f"{part}_loss"] == pytest.approx(losses[some].mean().item(), rel=1e-6)
        stderr = losses[some].std().item() / len(losses[some]) ** 0.5
        assert row[f"{part}_loss_stderr"] == pytest.approx(stderr, rel=1e-4)
        assert row[f"{part}_accuracy"] == pytest.approx(right[some].mean().item())
        assert row[f"{part}_loss_null"] == pytest.approx(math.log(64))
    assert pd.isna(row["restricted_loss"])
    assert pd.isna(row["gini_embedding"])
    assert (row["n"], row["validity"]) == (30, "ok")


def test_the_gap_of_a_model_that_saw_the_training_questions():
    rows = torch.randint(64, (200, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Bigram()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        logits = model(rows[:20, :-1]).flatten(0, 1)
        F.cross_entropy(logits, rows[:20, 1:].flatten()).backward()
        optimizer.step()
    row = told(model, Task(train=rows[:20], held_out=rows[100:], answer=11))
    assert row["loss_gap"] > 10 * row["loss_gap_stderr"]
    assert row["accuracy_gap"] > 10 * row["accuracy_gap_stderr"]
    same = told(model, Task(train=rows[50:100], held_out=rows[100:], answer=11))
    assert abs(same["loss_gap"]) < 4 * same["loss_gap_stderr"]


def test_the_norm_of_all_weights_counts_each_once():
    torch.manual_seed(0)
    model = AnswerOnly(11)
    task = ModularAddition(11, train=random_pairs(11), sequence=("a", "b"))
    expected = sum(p.double().square().sum().item() for p in model.parameters()) ** 0.5
    assert told(model, task)["weight_norm"] == pytest.approx(expected, rel=1e-6)
    model.hidden.bias = model.unembedding.bias = torch.nn.Parameter(torch.ones(32))
    model.unembedding = torch.nn.Linear(32, 11)
    model.tied = model.hidden
    expected = sum(p.double().square().sum().item() for p in model.parameters()) ** 0.5
    row = told(model, task)
    assert row["weight_norm"] == pytest.approx(expected, rel=1e-6)
    assert row["weight_norm_stderr"] == row["weight_norm_null"] == 0


def test_named_frequencies_add_columns_and_change_no_others():
    logits = oracle.random_logits(11) + wave_logits(11, [2], 6.0)
    task = ModularAddition(11, train=random_pairs(11))
    plain = told(LooksUp(logits), task)
    named = told(LooksUp(logits), dataclasses.replace(task, keys=[2]))
    own = [name for name in plain.index if "_named" not in name]
    lists = ["key_frequencies", "spectrum"]
    assert named[own].drop(lists).equals(plain[own].drop(lists))
    assert named["restricted_loss_named"] == named["restricted_loss"]
    assert plain.filter(like="_named").isna().all()
