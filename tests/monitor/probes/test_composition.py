"""`composition`: thin products against whole matrices and against TransformerLens, a planted
circuit, the null against random heads drawn one by one, and an impostor whose matrices compose to
no effect.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from monitor.anatomy import find_language_model
from monitor.capture import observe
from monitor.demo import model as demo
from monitor.evidence import Columns, Evidence
from monitor.parts import Parts, find_parts
from monitor.probes import composition, induction
from monitor.probes.composition import null, ratios, triangle
from monitor.stimuli import repeated_from
from tests import models
from tests.models import AttentionOnly, PlantedCircuit
from tests.monitor.probes.tables import EVEN, INDUCTION, PREVIOUS
from tests.monitor.probes.tables import induction as induction_table
from tests.monitor.test_parts import Encoder, hugging_face, randomised
from tests.oracles import weights as oracle

Pair = tuple[int, int, int, int, str]


def rows(parts: Parts, heads: Columns | None = None) -> dict[Pair, dict]:
    """By pair and kind."""
    tables = {} if heads is None else {"induction": heads}
    columns = composition.compute(Evidence(observations={}, parts=parts, tables=tables))
    listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    dims = [dim.name for dim in composition.SPEC.dims]
    found = {tuple(row[dim] for dim in dims): row for row in listed}
    assert len(found) == len(listed)
    return found


def parts_of(model: nn.Module) -> Parts:
    return find_parts(find_language_model(model))


@pytest.mark.parametrize("family", oracle.OF)
def test_every_pair_against_the_oracle(family):
    model = hugging_face(family, "eager")
    whole, found = oracle.OF[family](model), rows(parts_of(model))
    assert len(found) == 4 * 4 * 3
    for (layer, head, later, other, kind), row in found.items():
        expected = oracle.composition(whole.layers[layer][head], whole.layers[later][other], kind)
        assert row["ratio"] == pytest.approx(expected, abs=1e-5)
        assert row["excess"] == pytest.approx(expected - row["ratio_null"], abs=1e-5)
        assert row["excess_null"] == 0
        assert row["excess_null_sd"] == row["ratio_null_sd"] > 0
        assert row["validity"] == "ok"
    assert torch.tensor([row["ratio"] for row in found.values()]).std() > 0.01


@pytest.fixture
def build_bridge():
    """TransformerLens's, whose import silences transformers."""
    verbosity = transformers.logging.get_verbosity()
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    yield build_bridge_from_module
    transformers.logging.set_verbosity(verbosity)


def test_every_pair_against_transformer_lens(build_bridge):
    """It folds no norm; here their gains are 1, and they take no mean off."""
    model = models.llama().eval()
    found = rows(parts_of(model))
    copied = copy.deepcopy(model)
    bridge = build_bridge(copied, type(model).__name__, hf_config=copied.config)
    with torch.no_grad():
        scores = {kind: bridge.all_composition_scores(kind.upper()).scores for kind in "qkv"}
    assert len(found) == 3 * models.HEADS**2
    for (*place, kind), row in found.items():
        assert row["ratio"] == pytest.approx(float(scores[kind][tuple(place)]), abs=1e-6)


def test_thin_products_are_whole_ones_in_float64():
    """Also where one number of a head is a multiple of another, or none."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    value, output, into, then = drawn(3, 40, 8), drawn(3, 8, 40), drawn(5, 40, 6), drawn(5, 40, 6)
    value[0, :, 1] = 2 * value[0, :, 0]
    then[1, :, 3] = 0
    found = ratios(triangle(value) @ output, into @ triangle(then).mT)
    for source in range(3):
        for target in range(5):
            writes, reads = value[source] @ output[source], into[target] @ then[target].T
            expected = (writes @ reads).norm() / writes.norm() / reads.norm()
            assert float(found[source, target]) == pytest.approx(float(expected), abs=1e-6)


def test_the_planted_circuit_composes_through_keys_alone():
    found = rows(parts_of(PlantedCircuit()))
    pair = {kind: found[0, 0, 1, 0, kind] for kind in "qkv"}
    assert pair["k"]["ratio"] == pytest.approx(40**-0.5, abs=1e-6)
    assert pair["q"]["ratio"] == pytest.approx(0, abs=1e-6)
    assert pair["v"]["ratio"] == pytest.approx(0, abs=1e-6)
    strongest = max(found, key=lambda place: found[place]["excess"])
    assert strongest == (0, 0, 1, 0, "k")
    assert pair["k"]["excess"] > 20 * pair["k"]["excess_null_sd"]
    others = [row for place, row in found.items() if place != strongest]
    assert max(row["excess"] / row["excess_null_sd"] for row in others) < 5


def test_the_planted_circuit_is_one():
    """Its attention is as known: of 12 queries the one at the first token also sees it at position
    0, which has nothing before it but itself.
    """
    random = torch.Generator().manual_seed(0)
    blocks = torch.stack([torch.randperm(40, generator=random)[:12] for _ in range(8)])
    stimulus = repeated_from(blocks.repeat(1, 2), torch.full((8,), 12), lead=0)
    seen = observe(find_language_model(PlantedCircuit(decoy=True)), stimulus, attention=True)
    columns = induction.compute(Evidence(observations={"repeated": seen}))
    assert columns["previous_token"][0].item() == pytest.approx(1, abs=1e-5)
    assert columns["prefix_matching"][4:6].tolist() == pytest.approx([23 / 24] * 2, abs=1e-5)
    others = [columns["prefix_matching"][head].item() for head in (0, 1, 2, 3, 6, 7)]
    assert max(others) < 0.2


def test_an_impostor_composes_without_effect():
    """The decoy reads what the planted circuit's first head writes just as the induction head does,
    and nothing reads what it makes of that: as high a number, and no logit is the lower for its
    absence.
    """
    model = PlantedCircuit(decoy=True)
    found = rows(parts_of(model))
    real, decoy = found[0, 0, 1, 0, "k"], found[0, 0, 1, 1, "k"]
    assert decoy["ratio"] == pytest.approx(real["ratio"], abs=1e-6)
    tokens = torch.randint(40, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
        model.blocks[1].output.weight[:, 40:80] = 0
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-4)
        model.blocks[1].output.weight[:, :40] = 0
        assert float((model(tokens) - before).abs().max()) > 10
    assert all("no cause" in field.fooled_by for field in composition.SPEC.fields)


@pytest.mark.parametrize(
    ("features", "size", "mean"), [(64, 16, 0.1233), (128, 32, 0.0876), (768, 64, 0.0360)]
)
def test_the_null_is_that_of_random_heads(features, size, mean):
    found, sd = null(features, size, size)
    drawn = oracle.random_compositions(features, size, draws=40, seed=3)
    error = float(drawn.std()) / 40**0.5
    assert found == pytest.approx(float(drawn.mean()), abs=5 * error)
    assert found == pytest.approx(mean, rel=0.02)
    assert sd == pytest.approx(float(drawn.std()), rel=0.5)


def test_heads_that_were_not_trained_are_at_the_null():
    torch.manual_seed(0)
    found = rows(parts_of(AttentionOnly(width=128, heads=4, layers=4)))
    excess = [row["excess"] / row["excess_null_sd"] for row in found.values()]
    assert max(excess) < 5


def test_only_the_strongest_are_kept(monkeypatch):
    model = randomised(lambda: AttentionOnly(layers=4))
    found = rows(parts_of(model))
    for kind in "qkv":
        own = [row["excess"] for place, row in found.items() if place[-1] == kind]
        assert len(own) == 64 < 6 * 16
        assert own == sorted(own, reverse=True)
    monkeypatch.setattr(composition, "_STRONGEST", 1000)
    whole = rows(parts_of(model))
    assert len(whole) == 3 * 6 * 16
    left = {place for place in whole if place not in found}
    for kind in "qkv":
        worst = min(row["excess"] for place, row in found.items() if place[-1] == kind)
        assert all(whole[place]["excess"] <= worst for place in left if place[-1] == kind)


def test_whether_the_heads_of_a_circuit_compose_is_told_however_little_they_do(monkeypatch):
    torch.manual_seed(0)
    model = AttentionOnly(layers=4)
    whole = rows(parts_of(model))
    weakest = min(
        (place for place in whole if place[-1] == "k"), key=lambda place: whole[place]["excess"]
    )
    heads = {(layer, head): EVEN for layer in range(4) for head in range(4)}
    heads |= {weakest[:2]: PREVIOUS, weakest[2:4]: INDUCTION}
    for name, value in {"_STRONGEST": 5, "_FOREMOST": 1}.items():
        monkeypatch.setattr(composition, name, value)
    assert weakest not in rows(parts_of(model))
    found = rows(parts_of(model), induction_table(heads))
    assert len(found) == 3 * 5 + 1
    assert found[weakest] == whole[weakest]


def test_the_first_layer_of_the_demo_needs_no_queries():
    """They read positions beside the stream, so that they have no matrix; what it writes has."""
    torch.manual_seed(0)
    parts = parts_of(demo.AttentionOnly())
    assert parts.blocks[0].w_q is None
    found = rows(parts)
    assert len(found) == 3 * 3 * 3
    assert {row["validity"] for row in found.values()} == {"ok"}


def test_pairs_of_which_all_is_known_are_published():
    parts = parts_of(randomised(lambda: AttentionOnly(layers=3)))
    one, two, three = parts.blocks
    two = replace(two, query=None, value=None, reasons={"query": "no query", "value": "no value"})
    found = rows(replace(parts, blocks=(one, two, three)))
    missing = {place: row for place, row in found.items() if row["validity"] != "ok"}
    path = "blocks.1"
    assert {place: row["validity"] for place, row in missing.items()} == {
        **{(1, -1, -1, -1, kind): f"value of {path}: no value" for kind in "qkv"},
        **{(-1, -1, 1, -1, kind): f"query of {path}: no query" for kind in "qk"},
        (-1, -1, 1, -1, "v"): f"value of {path}: no value",
    }
    assert all(row["ratio"] is row["excess"] is None for row in missing.values())
    pairs = {place[::2][:2] for place, row in found.items() if row["validity"] == "ok"}
    assert pairs == {(0, 2)}


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: Encoder(norm_first=False, batch_first=True), "norms its stream"),
        (lambda: AttentionOnly(layers=1), "no two layers"),
    ],
)
def test_rows_without_numbers_say_why(build, why):
    found = rows(parts_of(randomised(build)))
    assert found
    assert all(why in row["validity"] and row["ratio"] is None for row in found.values())


def test_a_model_of_which_nothing_is_known():
    hidden = Parts.none(find_language_model(AttentionOnly()), "it is hidden")
    (row,) = rows(hidden).values()
    assert row["validity"] == "it is hidden"


def test_heads_that_write_nothing_are_left_out():
    model = randomised(AttentionOnly)
    parts = parts_of(model)
    with torch.no_grad():
        model.blocks[0].output.weight[:, :16] = 0
        model.blocks[0].output.weight[0, 16] = float("nan")
    assert {place[1] for place in rows(parts)} == {2, 3}
    with torch.no_grad():
        model.blocks[0].output.weight.zero_()
    (row,) = rows(parts).values()
    assert row["validity"] == "no two layers have heads that write and read"


def test_the_global_random_stream_is_left_alone():
    parts = parts_of(randomised(AttentionOnly))
    null.cache_clear()
    before = torch.random.get_rng_state()
    rows(parts)
    assert torch.equal(torch.random.get_rng_state(), before)
