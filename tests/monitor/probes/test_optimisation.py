"""The table of what training does: sums over families against all parameters, stable ranks against
all singular values and the null against random matrices; planted low rank, and what is
of full rank.
"""

import math

import pytest
import torch
from torch import nn

from monitor.anatomy import find_language_model
from monitor.evidence import Evidence
from monitor.measure import Monitor, measure
from monitor.optimising import NOT_YET, UNFORESEEN, UNWATCHED
from monitor.parts import find_parts
from monitor.probes import select
from monitor.probes.optimisation import compute, families, random_stable_rank, stable_rank
from tests import models
from tests.callbacks.tiny import TinyLM, text

PROBES = ["optimisation"]


def exact(matrix):
    values = torch.linalg.svdvals(matrix.double())
    return float(values.square().sum() / values[0] ** 2)


@pytest.mark.parametrize(
    "shape", [(1, 5), (5, 1), (2, 2), (7, 40), (64, 64), (300, 200), (512, 512), (100, 2_000)]
)
def test_stable_ranks_are_those_of_all_singular_values(shape):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(shape, generator=generator)
        assert exact(matrix) * 0.9999 <= stable_rank(matrix) <= exact(matrix) * 1.01


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_a_matrix_of_any_scale(scale):
    matrix = torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])) * scale
    assert stable_rank(matrix) == pytest.approx(1.75, rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 50), (64, 64), (400, 100), (200, 1)])
def test_the_null_is_what_random_matrices_have(shape):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([exact(torch.randn(shape, generator=generator)) for _ in range(200)])
    mean, sd = random_stable_rank(*shape)
    assert mean == pytest.approx(drawn.mean().item(), rel=0.02)
    assert sd == pytest.approx(drawn.std().item(), rel=0.25, abs=1e-6)


def ranks_of(weight):
    """Stable rank of the MLP, beside its null, when all its matrices are this one."""
    torch.manual_seed(0)
    model = models.gpt2()
    for block in model.transformer.h:
        for layer in (block.mlp.c_fc, block.mlp.c_proj):
            rows, columns = layer.weight.shape
            layer.weight.data = weight(rows, columns)
    table = measure(model, probes=PROBES)["optimisation"].set_index("family")
    return table.loc["mlp", ["stable_rank", "stable_rank_null", "stable_rank_null_sd"]]


def test_a_planted_direction_stands_out_and_noise_does_not():
    found, null, sd = ranks_of(lambda r, c: torch.randn(r, c) + torch.randn(r, 1) * torch.randn(c))
    assert found < null - 10 * sd
    assert found < 4
    found, null, sd = ranks_of(torch.randn)
    assert abs(found - null) < 4 * sd
    # Of full rank as noise is, and further from one direction than that.
    found, null, sd = ranks_of(torch.eye)
    assert found > null + 10 * sd


def test_the_families_of_a_known_model():
    torch.manual_seed(0)
    by_name = families(find_parts(find_language_model(models.gpt2())))
    assert set(by_name.values()) == {"embedding", "attention", "mlp", "norm"}
    for name, family in by_name.items():
        kind = next(k for k in ("wte", "wpe", "ln_", "attn", "mlp") if k in name)
        expected = {"wte": "embedding", "wpe": "embedding", "ln_": "norm", "attn": "attention"}
        assert family == expected.get(kind, "mlp"), name
    by_name = families(find_parts(find_language_model(TinyLM())))
    assert by_name["unembedding.weight"] == by_name["unembedding.bias"] == "unembedding"
    assert by_name["blocks.1.qkv.bias"] == by_name["blocks.0.out.weight"] == "attention"


def trained(monitor, model, *, steps=1, every=1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    monitor.watch(optimizer, every=every)
    tables = [monitor.measure(model, step=0)]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        tokens = text(4, seed=step)
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        tables.append(monitor.measure(model, step=step, tokens=10 * step, loss=loss))
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    return [one.frame("optimisation").set_index("family") for one in tables], moved, loss


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors]).norm().item()


def test_a_row_is_of_all_the_parameters_of_its_family():
    torch.manual_seed(0)
    model = TinyLM()
    with Monitor(root=None, probes=PROBES) as monitor:
        (before, after), moved, loss = trained(monitor, model)
    assert set(before["validity"]) == {NOT_YET}
    assert before["update_norm"].isna().all()
    assert (before["weight_norm"] > 0).all()
    assert set(after["validity"]) == {"ok"}
    row = after.loc["all"]
    assert row["n"] == len(list(model.parameters()))
    assert row["loss"] == pytest.approx(loss.item())
    assert row["learning_rate"] == pytest.approx(0.01)
    assert row["gradient_norm"] == pytest.approx(flat(p.grad for p in model.parameters()))
    assert row["weight_norm"] == pytest.approx(flat(model.parameters()))
    assert row["update_norm"] == pytest.approx(flat(moved), rel=1e-5)
    assert row["update_norm_null"] == pytest.approx(0.01 * row["gradient_norm"])
    assert row["update_ratio"] == pytest.approx(row["update_norm"] / row["weight_norm"])
    others = after.drop("all")
    for field in ("gradient_norm", "weight_norm", "update_norm"):
        assert math.sqrt((others[field] ** 2).sum()) == pytest.approx(row[field])
    assert others["n"].sum() == row["n"]
    assert others["loss"].isna().all()
    assert row["steps_per_second"] > 0
    assert others.loc["unembedding", "weight_norm"] == pytest.approx(
        flat(model.unembedding.parameters())
    )


def test_updates_that_were_not_read_are_missing():
    model = TinyLM()
    with Monitor(root=None, probes=PROBES) as monitor:
        tables, _, _ = trained(monitor, model, steps=4, every=2)
    said = [table.loc["all", "validity"] for table in tables]
    assert said == [NOT_YET, UNFORESEEN, "ok", UNFORESEEN, "ok"]
    assert tables[3][["update_norm", "gradient_norm", "learning_rate"]].isna().all(axis=None)
    # The loss was passed, and is that of the step all the same.
    assert tables[3].loc["all", "loss"] > 0


def test_a_family_without_an_optimiser():
    model = TinyLM()
    optimizer = torch.optim.SGD(model.blocks.parameters(), lr=0.1)
    with Monitor(root=None, probes=PROBES) as monitor:
        monitor.watch(optimizer, every=1)
        model(text(2)).square().mean().backward()
        optimizer.step()
        table = monitor.measure(model, step=1).frame("optimisation").set_index("family")
    assert table.loc["attention", "validity"] == "ok"
    assert table.loc["unembedding", "validity"].startswith("no optimiser that is watched updates")
    assert math.isnan(table.loc["unembedding", "update_norm"])


def test_it_is_there_by_default_only_where_an_optimiser_is_watched():
    assert "optimisation" in {probe.spec.name for probe in select(None)}
    assert "optimisation" not in measure(TinyLM(), context=16, sequences=2)
    with Monitor(root=None, context=16, sequences=2) as monitor:
        names = {reading.spec.name for reading in monitor.measure(TinyLM(), step=0).readings}
    assert "optimisation" not in names
    with Monitor(root=None, context=16, sequences=2) as monitor:
        model = TinyLM()
        monitor.watch(torch.optim.SGD(model.parameters(), lr=0.1))
        names = {reading.spec.name for reading in monitor.measure(model, step=0).readings}
    assert "optimisation" in names
    said = measure(TinyLM(), probes=PROBES)["optimisation"]["validity"]
    assert set(said) == {UNWATCHED}


def test_weights_that_are_divided_are_not_read():
    model = TinyLM()
    model.blocks[0].out.weight.placements = None
    evidence = Evidence(observations={}, parts=find_parts(find_language_model(model)))
    columns = compute(evidence)
    assert columns["validity"] == ["every process holds only a part of its weights"]


def test_a_loss_that_is_no_number_is_recorded_as_a_failure():
    with Monitor(root=None, probes=PROBES) as monitor:
        measurement = monitor.measure(TinyLM(), step=0, loss="low")
    assert [failure.part for failure in measurement.failures] == ["optimisers"]
    assert len(measurement.frame("optimisation")) > 1
