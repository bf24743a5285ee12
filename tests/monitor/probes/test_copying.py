"""`copying`: every number against whole matrices from tokens to tokens, a planted circuit, the null
against heads that are random, and an impostor that copies without induction.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from monitor.anatomy import find_language_model
from monitor.evidence import Evidence
from monitor.measure import measure
from monitor.parts import Parts, find_parts
from monitor.probes import copying
from tests.models import AttentionOnly, PlantedCircuit, train
from tests.monitor.test_parts import Encoder, hugging_face, randomised
from tests.oracles import weights as oracle


def rows(model: nn.Module) -> dict[tuple[int, int], dict]:
    """By layer and head."""
    parts = find_parts(find_language_model(model))
    columns = copying.compute(Evidence(observations={}, parts=parts))
    listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {(row["layer"], row["head"]): row for row in listed}


@pytest.mark.parametrize("family", oracle.OF)
def test_every_field_against_the_oracle(family):
    model = hugging_face(family, "eager")
    whole, found = oracle.OF[family](model), rows(model)
    assert list(found) == [(layer, head) for layer in range(2) for head in range(4)]
    for (layer, number), row in found.items():
        head = whole.layers[layer][number]
        shares = torch.tensor(oracle.direct_shares(whole, head))
        assert row["validity"] == "ok"
        assert row["n"] == len(shares) == 48
        assert row["direct_share_null"] == pytest.approx(1 / 48)
        assert row["direct_share"] == pytest.approx(float(shares.mean()), abs=1e-5)
        assert row["direct_share_stderr"] == pytest.approx(float(shares.std()) / 48**0.5, rel=1e-3)
        assert row["eigenvalue_score"] == pytest.approx(
            oracle.eigenvalue_score(whole, head), abs=1e-4
        )
    # The scores differ, or agreement would say little.
    assert torch.tensor([row["eigenvalue_score"] for row in found.values()]).std() > 0.02


def test_the_planted_induction_head_copies_and_no_other_reaches_the_logits():
    found = rows(PlantedCircuit(decoy=True))
    assert found[1, 0]["eigenvalue_score"] == pytest.approx(1, abs=1e-5)
    assert found[1, 0]["direct_share"] == pytest.approx(1, abs=1e-5)
    for place, row in found.items():
        if place != (1, 0):
            assert row["validity"] == "what it writes does not reach the logits"
            assert row["eigenvalue_score"] is row["direct_share"] is None


def test_a_head_that_suppresses_scores_minus_one():
    model = PlantedCircuit()
    with torch.no_grad():
        model.unembedding.weight.neg_()
    row = rows(model)[1, 0]
    assert row["eigenvalue_score"] == pytest.approx(-1, abs=1e-5)
    assert row["direct_share"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("width", "heads", "sd"), [(64, 4, 0.10), (768, 12, 0.023)])
def test_the_null_is_that_of_random_heads(width, heads, sd):
    torch.manual_seed(0)
    model = AttentionOnly(vocab_size=1024, width=width, heads=heads, layers=2)
    found = list(rows(model).values())
    scores = torch.tensor([row["eigenvalue_score"] for row in found])
    null, null_sd = found[0]["eigenvalue_score_null"], found[0]["eigenvalue_score_null_sd"]
    assert abs(null) < 4 * null_sd / 8
    assert null_sd == pytest.approx(sd, rel=0.35)
    assert (scores - null).abs().max() < 4 * null_sd
    shares = torch.tensor([row["direct_share"] for row in found])
    errors = torch.tensor([row["direct_share_stderr"] for row in found])
    assert ((shares - 1 / 256).abs() < 5 * errors).all()


def test_what_is_added_to_all_logits_alike_changes_nothing():
    model = randomised(AttentionOnly)
    before = rows(model)
    with torch.no_grad():
        model.unembedding.weight.add_(3.0 * torch.randn(64))
    for place, row in rows(model).items():
        for field in ("eigenvalue_score", "direct_share"):
            assert row[field] == pytest.approx(before[place][field], abs=1e-4)


def test_an_impostor_copies_without_induction():
    """One layer that learns to raise what occurred before: copying is near 1, and no head looks at
    what came after the earlier copy.
    """
    torch.manual_seed(0)
    model = AttentionOnly(layers=1)
    train(model, (8, 32), steps=300)
    tables = measure(model, probes=["copying", "induction"], context=64)
    copied, looked = tables["copying"], tables["induction"]
    assert copied["eigenvalue_score"].max() > 0.9
    assert (copied["direct_share"] > 4 * copied["direct_share_null"]).any()
    best = looked.loc[looked["prefix_matching"].idxmax()]
    assert best["prefix_matching"] < 0.15


def test_rows_without_numbers_say_why():
    parts = find_parts(
        find_language_model(randomised(lambda: Encoder(norm_first=False, batch_first=True)))
    )
    columns = copying.compute(Evidence(observations={}, parts=parts))
    assert columns["head"] == [0, 1, 2, 3] * 2
    assert all("norms its stream" in why for why in columns["validity"])
    hidden = Parts.none(parts.model, "it is hidden")
    columns = copying.compute(Evidence(observations={}, parts=hidden))
    assert columns["validity"] == ["it is hidden"]
    assert columns["layer"] == columns["head"] == [-1]
    assert columns["eigenvalue_score"] == columns["direct_share"] == [None]


def test_weights_that_are_not_finite_spoil_only_their_heads():
    model = randomised(AttentionOnly)
    parts = find_parts(find_language_model(model))
    with torch.no_grad():
        model.blocks[0].output.weight[0, 0] = float("nan")
        model.blocks[1].output.weight.zero_()
    columns = copying.compute(Evidence(observations={}, parts=parts))
    none = "what it writes does not reach the logits"
    assert columns["validity"] == ["its weights are not finite", *["ok"] * 3, *[none] * 4]


def test_the_global_random_stream_is_left_alone():
    parts = find_parts(find_language_model(randomised(AttentionOnly)))
    before = torch.random.get_rng_state()
    copying.compute(Evidence(observations={}, parts=parts))
    assert torch.equal(torch.random.get_rng_state(), before)
