"""`attribution`: every component's term against the oracle on families that write their streams in
different ways, a planted circuit whose terms are known, and heads that attend right and write
nothing that is read.
"""

import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe
from monitor.evidence import Evidence
from monitor.measure import measure
from monitor.parts import find_parts
from monitor.probes import attribution
from monitor.stimuli import repeated
from monitor.streams.attribution import Questions
from tests.models import FAMILIES, HEADS, LAYERS, AttentionOnly, PlantedCircuit
from tests.oracles import streams as oracle

STIMULUS = repeated(vocab_size=48, sequences=3, context=24, bos=0, seed=0)


def far_from_its_beginning(module: torch.nn.Module) -> torch.nn.Module:
    """Biases and the gains of norms as different as training makes them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def rows(module: torch.nn.Module, stimulus=STIMULUS) -> dict[tuple, dict[str, float]]:
    model = find_language_model(module)
    seen = observe(model, stimulus, attribution=True, parts=find_parts(model))
    columns = attribution.compute(Evidence(observations={"repeated": seen}))
    assert set(columns["validity"]) == {"ok"}, seen.reasons
    names = zip(columns["component"], columns["layer"], columns["head"], strict=True)
    numbers = [c for field in attribution.SPEC.fields for c in field.columns]
    return {
        name: {number: float(columns[number][row]) for number in numbers}
        for row, name in enumerate(names)
    }


@pytest.mark.parametrize("family", oracle.ANATOMIES)
def test_every_term_against_the_oracle(family):
    kind = FAMILIES[family]
    module = far_from_its_beginning(kind.build(kind.implementations[0]))
    questions = Questions.of(STIMULUS)
    shuffled = torch.full_like(STIMULUS.tokens, -1)
    shuffled[questions.sequence, questions.query] = questions.targets[1]
    expected = oracle.attribution(
        module, oracle.ANATOMIES[family], STIMULUS.tokens, shuffled, LAYERS, HEADS
    )
    found = rows(module)
    assert found.keys() == expected.keys()
    count = questions.sequence.bincount().double()
    largest = max(abs(mean) for means in expected.values() for mean, _ in means)
    for name, means in expected.items():
        correct, other = torch.tensor(means, dtype=torch.float64).T
        weighted = [float((values * count).sum() / count.sum()) for values in (correct, other)]
        slack = {"rel": 1e-3, "abs": 1e-5 * largest}
        assert found[name]["logit"] == pytest.approx(weighted[0], **slack), name
        assert found[name]["logit_null"] == pytest.approx(weighted[1], **slack), name
        contrast = weighted[0] - weighted[1]
        assert found[name]["contrast"] == pytest.approx(contrast, **slack), name
        spread = (correct - other - contrast) * count
        stderr = float((spread.square().sum() * 3 / 2).sqrt() / count.sum())
        assert found[name]["contrast_stderr"] == pytest.approx(stderr, **slack), name
    # Heads differ, or agreement would say little.
    heads = [found[name]["logit"] for name in found if name[0] == "head"]
    assert max(heads) - min(heads) > 0.01 * largest


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_add_up_to_the_models_own_logits(family):
    kind = FAMILIES[family]
    module = far_from_its_beginning(kind.build(kind.implementations[0]))
    found = rows(module)
    total = found.pop(("logit", -1, -1))
    for number in ("logit", "logit_null", "contrast"):
        assert sum(row[number] for row in found.values()) == pytest.approx(total[number], rel=1e-3)
    if family == "gemma2":
        return  # its logits are capped afterwards
    with torch.no_grad():
        logits = module(STIMULUS.tokens).logits
    questions = Questions.of(STIMULUS)
    own = logits[questions.sequence, questions.query, questions.targets[0]].mean()
    assert total["logit"] == pytest.approx(float(own), rel=1e-4)


def test_a_planted_circuit_is_read_exactly():
    """The unembedding reads what head 1.0 writes, 20 times: its attention is 1 on the token that
    comes next, and nothing else writes there. The second head attends just so and writes where
    nothing reads.
    """
    stimulus = repeated(vocab_size=40, sequences=4, context=24, bos=None, seed=0)
    module = PlantedCircuit(decoy=True)
    found = rows(module, stimulus)
    writer = found.pop(("head", 1, 0))
    assert writer["logit"] == pytest.approx(20, abs=0.05)
    assert writer["contrast"] == pytest.approx(20, abs=0.05)
    assert writer["logit_null"] == pytest.approx(0, abs=0.05)
    assert writer["contrast_stderr"] < 0.05
    whole = found.pop(("logit", -1, -1))
    assert whole["logit"] == pytest.approx(writer["logit"], abs=1e-3)
    for name, row in found.items():
        assert abs(row["contrast"]) < 1e-3, name
    # The impostor is one: it attends as the head does that writes the answer.
    heads = measure(module, context=24, probes=["induction.prefix_matching"])["induction"]
    scores = heads.set_index(["layer", "head"])["prefix_matching"]
    assert scores[1, 1] == pytest.approx(scores[1, 0], abs=1e-3)
    assert scores[1, 1] > 0.95


def test_random_weights_write_nothing_in_particular():
    torch.manual_seed(0)
    stimulus = repeated(vocab_size=64, sequences=32, context=64, bos=None, seed=0)
    found = rows(AttentionOnly(), stimulus)
    beyond = [abs(row["contrast"]) > 4 * row["contrast_stderr"] + 1e-6 for row in found.values()]
    assert sum(beyond) == 0


def test_why_there_is_no_attribution_is_said():
    seen = Observation(stimulus=STIMULUS, vocab_size=48, reasons={"attribution": "no norm found"})
    columns = attribution.compute(Evidence(observations={"repeated": seen}))
    assert columns["validity"] == ["no norm found"]
    assert columns["logit"] is None
    assert columns["component"] == ["logit"]
