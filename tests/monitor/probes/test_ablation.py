"""What is said of ablated heads: against the in-context losses of models without them, in planted
circuits, redundant ones, and with a head that only looks like one; and which are ablated together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from monitor.ablating import ablated_losses
from monitor.anatomy import find_language_model
from monitor.attention import SelfAttention
from monitor.batches import StimulusOptions
from monitor.evidence import Evidence
from monitor.measure import measure
from monitor.probes import ablation, select
from monitor.record import Moment
from monitor.subject import Subject
from tests.callbacks.tiny import TinyLM
from tests.models import AttentionOnly, PlantedCircuit
from tests.models.hand_built import attend_by_sums, train
from tests.oracles.ablation import without

NOW = Moment(run="", attempt=1, step=0, tokens=None, time=datetime.now(UTC))
FIELDS = ("repeat_later", "score", "paired_score")


def outputs(model: nn.Module, layer: int) -> torch.Tensor:
    return model.blocks[layer].output.weight.T


def silenced(model: PlantedCircuit, *heads: tuple[int, int]) -> nn.Module:
    return without(model, heads, size=model.blocks[0].size, outputs=outputs)


def text_of(model: nn.Module, positions: int) -> torch.Tensor:
    """Repeats itself at its half, so that its context is of use."""
    vocabulary = model.unembedding.out_features
    random = torch.Generator().manual_seed(3)
    half = torch.randint(vocabulary, (12, positions // 2), generator=random)
    return torch.cat([half, half], dim=1)


def told(model: nn.Module, **more: Any) -> pd.DataFrame:
    return measure(model, probes=["ablation"], **{"sequences": 6, **more})["ablation"]


def rows(table: pd.DataFrame, group: str, method: str = "zero") -> pd.DataFrame:
    chosen = (table["group"] == group) & (table["method"] == method)
    return table[chosen].set_index("heads")


def row(table: pd.DataFrame, group: str, method: str = "zero") -> pd.Series:
    (only,) = (chosen for _, chosen in rows(table, group, method).iterrows())
    return only


@pytest.fixture(scope="module")
def planted() -> pd.DataFrame:
    model = PlantedCircuit()
    return told(model, text=text_of(model, 24))


@pytest.fixture(scope="module")
def trained() -> AttentionOnly:
    """Two layers that learnt to copy what is repeated: some of their heads by induction."""
    torch.manual_seed(0)
    model = AttentionOnly()
    train(model, (8, 24), steps=400, rate=3e-3)
    return model


def test_ablating_a_planted_circuit_takes_away_what_it_does(planted):
    assert set(planted["validity"]) == {"ok"}
    for method in ("zero", "mean", "mean_patterns_kept"):
        induction = row(planted, "induction", method)
        assert induction.name == "1.0"
        assert induction["repeat_later"] > 3
        assert abs(induction["repeat_later_null"]) < 0.01
        assert induction["over_random"] > 20 * induction["over_random_stderr"]
    assert row(planted, "previous_token").name == "0.0"
    assert row(planted, "previous_token")["over_random"] > 2
    idle = planted[planted["group"].str.startswith("random")]
    assert len(idle) == 6 * 2 + 4
    assert idle["repeat_later"].abs().max() < 1e-4


@pytest.fixture(scope="module")
def learnt(trained) -> pd.DataFrame:
    return told(trained, text=text_of(trained, 64))


@pytest.mark.parametrize("circuit", ["planted", "trained"])
def test_effects_are_what_a_model_without_the_heads_loses(circuit, planted, trained, learnt):
    model, table = (PlantedCircuit(), planted) if circuit == "planted" else (trained, learnt)
    text = text_of(model, 24 if circuit == "planted" else 64)
    before = measure(model, probes=["in_context"], text=text, sequences=6)["in_context"].iloc[0]
    tested = table[table["method"] == "zero"]
    for heads, measured in tested.drop_duplicates("heads").set_index("heads").iterrows():
        named = [tuple(map(int, head.split("."))) for head in str(heads).split()]
        size = model.blocks[0].output.in_features // 4
        less = without(model, named, size=size, outputs=outputs)
        after = measure(less, probes=["in_context"], text=text, sequences=6)["in_context"].iloc[0]
        for field in FIELDS:
            assert measured[field] == pytest.approx(after[field] - before[field], abs=3e-5), heads


def test_errors_are_those_of_paired_differences(trained):
    """What they say is what other random tokens change."""
    said = []
    for seed in range(8):
        evidence = evidence_of(trained, sequences=16, seed=seed)
        stage = ablation.plan(evidence)[0]
        subject = subject_of(trained, sequences=16, seed=seed)
        made = {
            one: {
                name: ablated_losses(evidence.known_parts(), stimulus.tokens, one, {})
                for name, stimulus in subject.stimuli.items()
                if name in evidence.observations
            }
            for one in stage
            if one.by == "zero"
        }
        columns = ablation.compute(dataclasses.replace(evidence, ablated=made))
        said.append((columns["repeat_later"][1:], columns["repeat_later_stderr"][1:]))
    effects, errors = (np.array(each) for each in zip(*said, strict=True))
    # Of the random groups, which are the same for all seeds.
    ratio = effects.std(0, ddof=1).mean() / errors.mean()
    assert 0.5 < ratio < 2


def test_a_trained_model_loses_nats_without_the_heads_of_its_circuit(learnt):
    """All four heads of its second layer came to be induction heads, of which a group has two: the
    others stand in for them, but for the previous-token heads nothing does.
    """
    for method in ("zero", "mean"):
        previous = row(learnt, "previous_token", method)
        assert previous["repeat_later"] > 2
        assert previous["over_random"] > 5 * previous["over_random_stderr"]
        assert 0.1 < row(learnt, "induction", method)["repeat_later"] < 1
    kept = row(learnt, "induction", "mean_patterns_kept")
    assert kept["over_random"] > 5 * kept["over_random_stderr"]


def test_nulls_are_those_of_the_other_random_groups(learnt):
    for (_, method), rows_of_size in learnt.groupby(
        [learnt["heads"].str.split().str.len(), "method"]
    ):
        random = rows_of_size[rows_of_size["group"].str.startswith("random")]
        assert 4 <= len(random) <= 8, method
        for _, one in rows_of_size.iterrows():
            others = random[random["heads"] != one["heads"]]
            for field in FIELDS:
                assert one[f"{field}_null"] == pytest.approx(others[field].mean(), abs=1e-5)
                assert one[f"{field}_null_sd"] == pytest.approx(others[field].std(), abs=1e-5)
            worst = others["repeat_later"].max()
            assert one["over_random"] == pytest.approx(one["repeat_later"] - worst, abs=1e-5)
            assert one["over_random_null"] == 0


def test_a_head_that_only_looks_like_induction_is_no_cause():
    """It attends as the induction head did, and writes nothing at all."""
    impostor = silenced(PlantedCircuit(), (1, 0))
    table = told(impostor, text=text_of(impostor, 24))
    for method in ("zero", "mean", "mean_patterns_kept"):
        induction = row(table, "induction", method)
        assert (induction.name, induction["validity"]) == ("1.0", "ok")
        assert induction["repeat_later"] == 0
        assert induction["over_random"] <= 0
    decoy = told(PlantedCircuit(decoy=True), text=text_of(impostor, 24))
    assert row(decoy, "induction").name == "1.0 1.1"
    single = rows(decoy, "head").loc["1.1"]
    assert single["over_random"] <= 3 * single["over_random_stderr"]
    assert rows(decoy, "head").loc["1.0", "over_random"] > 3


def test_where_random_groups_hurt_as_much_a_large_effect_is_no_proof():
    evidence = evidence_of(PlantedCircuit())
    planned = [one for stage in ablation.plan(evidence) for one in stage]
    intact = {name: seen.losses for name, seen in evidence.observations.items()}
    hurt = {name: losses + 3 for name, losses in intact.items()}
    columns = ablation.compute(dataclasses.replace(evidence, ablated=dict.fromkeys(planned, hurt)))
    assert columns["repeat_later"] == pytest.approx([3.0] * len(columns["group"]))
    assert columns["over_random"] == [0.0] * len(columns["group"])
    assert min(columns["over_random_stderr"]) > 0


@pytest.mark.parametrize("place", range(4))
def test_nothing_hurts_more_than_a_random_group_whose_loss_is_not_finite(place):
    evidence = evidence_of(PlantedCircuit())
    stage = ablation.plan(evidence)[0]
    intact = {name: seen.losses for name, seen in evidence.observations.items()}
    hurt = {one: {n: loss + 9 * (one in stage[:2]) for n, loss in intact.items()} for one in stage}
    random = [one for one in stage[2:] if one.by == "zero"]
    hurt[random[place]] = {name: torch.full_like(loss, math.nan) for name, loss in intact.items()}
    columns = ablation.compute(dataclasses.replace(evidence, ablated=hurt))
    group = columns["group"].index("induction")
    assert columns["repeat_later"][group] == pytest.approx(9)
    assert not columns["over_random"][group] > 0


def test_redundant_heads_hide_each_other_and_not_from_their_group():
    model = PlantedCircuit(decoy=True)
    with torch.no_grad():
        # The same values as the induction head's, and the same way to write them.
        size = model.blocks[1].size
        inputs = model.blocks[1].inputs.weight.unflatten(0, (3, 4, size))
        inputs[:, 1] = inputs[:, 0]
        written = outputs(model, 1).unflatten(0, (4, size))
        written[1] = written[0]
    table = told(model, text=text_of(model, 24))
    group = row(table, "induction")
    assert sorted(str(group.name).split()) == ["1.0", "1.1"]
    assert group["repeat_later"] > 3
    singles = rows(table, "head").loc[["1.0", "1.1"], "repeat_later"]
    assert singles.max() < 0.2
    assert (singles <= group["repeat_later"]).all()


def test_before_any_head_shows_it_the_best_one_begins_the_series():
    torch.manual_seed(0)
    table = told(TinyLM(), text=torch.randint(32, (8, 32)))
    assert set(table["group"]) == {"induction", *(f"random {i} of size 1" for i in (1, 2, 3))}
    assert set(table["method"]) == {"zero", "mean"}
    assert set(rows(table, "induction")["validity"]) == {"no head shows prefix matching"}
    assert table["repeat_later"].notna().all()


def test_too_few_random_groups_are_no_proof():
    """Four heads in all: two are the circuit, and of the others two random groups can be made."""
    model = PlantedCircuit(heads=2)
    table = told(model, text=text_of(model, 24))
    assert set(table["validity"]) == {"fewer than 4 random groups of its size"}
    assert row(table, "induction")["repeat_later"] > 3


def test_without_text_the_repeated_tokens_remain(planted):
    table = told(PlantedCircuit())
    assert table[["score", "score_stderr", "score_null", "paired_score"]].isna().all(axis=None)
    same = ["group", "method", "heads", "repeat_later", "over_random", "validity"]
    pd.testing.assert_frame_equal(table[same], planted[same], atol=1e-5)


def test_a_model_whose_heads_cannot_be_ablated_says_so():
    model = AttentionOnly(attend=attend_by_sums)

    def read(module, args, kwargs, output):
        query, key, _ = module.projected(args[0])
        return SelfAttention(query=query, key=key, is_causal=True)

    table = told(model, adapters={type(model.blocks[0]): read})
    assert len(table) == 1
    assert "not found" in table["validity"][0]
    assert table["repeat_later"].isna().all()


# Which heads, and when.


def subject_of(model: nn.Module, **more: Any) -> Subject:
    options = StimulusOptions(
        **({} if more else {"text": text_of(model, 24), "sequences": 6}), **more
    )
    return Subject.new(model, find_language_model(model), select(["ablation"]), options)


def evidence_of(model: nn.Module, **more: Any) -> Evidence:
    """What the probe draws on, before anything is ablated."""
    seen: list[Evidence] = []

    def plan(evidence):
        seen.append(evidence)
        return ()

    probe = dataclasses.replace(select(["ablation"])[0], plan=plan, compute=lambda _: {})
    subject_of(model, **more).measure([probe], NOW)
    return seen[0]


class Planned:
    """The plan for scores that are said, of a model with `layers` of four heads."""

    def __init__(self, *, layers: int, prefix: dict, previous: dict) -> None:
        evidence = evidence_of(PlantedCircuit())
        heads = list(itertools.product(range(layers), range(4)))
        table: dict[str, Any] = {
            "layer": [layer for layer, _ in heads],
            "head": [head for _, head in heads],
            "validity": ["ok"] * len(heads),
        }
        for name, scores in (("prefix_matching", prefix), ("previous_token", previous)):
            table[name] = torch.tensor([scores.get(head, 0.02) for head in heads])
            table[f"{name}_stderr"] = torch.full((len(heads),), 0.01)
            table[f"{name}_null"] = torch.full((len(heads),), 0.02)
        block = evidence.parts.blocks[0]
        blocks = tuple(dataclasses.replace(block, layer=layer) for layer in range(layers))
        parts = dataclasses.replace(evidence.parts, blocks=blocks)
        evidence = dataclasses.replace(evidence, tables={"induction": table}, parts=parts)
        self.stages = ablation.plan(evidence)

    def heads(self, stage: int) -> list[tuple]:
        return list(dict.fromkeys(one.heads for one in self.stages[stage]))


def test_groups_are_the_best_heads_that_exceed_their_null():
    prefix = {(1, 0): 0.5, (2, 3): 0.9, (1, 1): 0.1, (3, 2): 0.3}
    previous = {(2, 3): 0.99, (0, 0): 0.4, (0, 1): 0.049}
    plan = Planned(layers=8, prefix=prefix, previous=previous)
    assert plan.heads(0)[0] == ((2, 3), (1, 0), (3, 2)), "0.1 is less than a tenth of the rest"
    assert plan.heads(2)[0] == ((0, 0),), "2.3 is in the first group, 0.1 within three errors"
    singles = [heads[0] for heads in plan.heads(4) if len(heads) == 1]
    assert singles[:3] == [(2, 3), (1, 0), (3, 2)]


def test_groups_are_no_larger_than_a_quarter_of_the_heads_and_eight():
    every = {head: 0.5 + 0.01 * head[0] for head in itertools.product(range(40), range(4))}
    assert len(Planned(layers=2, prefix=every, previous={}).heads(0)[0]) == 2
    assert len(Planned(layers=4, prefix=every, previous={}).heads(0)[0]) == 4
    assert len(Planned(layers=40, prefix=every, previous={}).heads(0)[0]) == 8


def test_random_groups_are_distinct_of_the_same_size_and_show_neither_pattern():
    showing = {(1, 0): 0.5, (2, 3): 0.9, (2, 1): 0.4}
    plan = Planned(layers=4, prefix=showing, previous={(0, 0): 0.5, (0, 1): 0.3})
    first, *random = plan.heads(0)
    more = [heads for heads in plan.heads(3) if len(heads) == 3]
    assert len({frozenset(heads) for heads in random + more}) == 8
    for heads in random + more:
        assert len(set(heads)) == len(first) == 3
        assert not set(heads) & {*showing, (0, 0), (0, 1)}


def test_random_groups_differ_by_more_than_a_head():
    """Five heads show no pattern; of four of them there are five groups, all nearly the same."""
    induction = {(2, head): 0.5 for head in range(4)}
    showing = {(1, head): 0.3 for head in range(4)} | {(3, head): 0.2 for head in range(3)}
    first, *random = Planned(layers=4, prefix=induction, previous=showing).heads(0)
    shared = [len(set(a) & set(b)) for a, b in itertools.combinations(random, 2)]
    assert len(first) == 4
    assert min(shared) < 3


def test_random_groups_are_the_same_at_every_step():
    """Also where a head comes to show a pattern, but for those that it was in."""
    before = Planned(layers=4, prefix={(1, 0): 0.5}, previous={})
    same = Planned(layers=4, prefix={(1, 0): 0.7}, previous={})
    assert before.heads(0) == same.heads(0)
    after = Planned(layers=4, prefix={(1, 0): 0.7}, previous={(0, 2): 0.5})
    kept = [heads for heads in before.heads(0) if (0, 2) not in heads[0]]
    assert len(set(kept) & set(after.heads(0))) >= len(kept) - 1


def test_what_lets_a_claim_be_made_comes_first_and_nothing_is_asked_twice():
    plan = Planned(layers=4, prefix={(1, 0): 0.5, (2, 1): 0.4}, previous={(0, 0): 0.5})
    methods = [{(one.by, one.patterns_kept) for one in stage} for stage in plan.stages]
    both = {("zero", False), ("mean", False)}
    assert methods == [both, {("mean", True)}, both, both, both]
    assert len(plan.stages[0]) == 2 * (1 + 4)
    assert len(plan.stages[1]) == 1 + 4
    asked = [one for stage in plan.stages for one in stage]
    assert len(set(asked)) == len(asked)
    assert sum(one.passes for one in asked) <= 60
