"""`logit_lens`: every field against the oracle, known answers at the last layer and for blocks that
write nothing, and a model whose layers agree because all predict the same.
"""

import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.capture import Observation, observe
from monitor.evidence import Evidence
from monitor.measure import measure
from monitor.parts import find_parts
from monitor.probes import logit_lens
from monitor.stimuli import text_stimulus
from monitor.streams import sampled_positions
from tests.models import FAMILIES, LAYERS, AttentionOnly, gpt2
from tests.oracles import streams as oracle

GENERATOR = torch.Generator().manual_seed(1)
TEXT = text_stimulus(torch.randint(48, (3, 32), generator=GENERATOR))
POSITIONS = sampled_positions(32)[1::2].tolist()


def columns_of(module: torch.nn.Module, stimulus=TEXT) -> dict:
    model = find_language_model(module)
    seen = observe(model, stimulus, lens=True, parts=find_parts(model))
    columns = logit_lens.compute(Evidence(observations={"text": seen}))
    assert set(columns["validity"]) == {"ok"}, seen.reasons
    return columns


@pytest.mark.parametrize("family", oracle.ANATOMIES)
def test_every_field_against_the_oracle(family):
    kind = FAMILIES[family]
    module = kind.build(kind.implementations[0]).eval()
    columns = columns_of(module)
    expected = oracle.lens(module, oracle.ANATOMIES[family], TEXT.tokens, POSITIONS, LAYERS)
    assert columns["layer"] == [-1, 0, 1]
    assert columns["n"] == [3] * 3
    for row, sequences in enumerate(expected):
        for field in ("loss", "agreement", "kl"):
            each = torch.tensor([getattr(one, field) for one in sequences])
            null = sum(getattr(one, f"{field}_null") for one in sequences) / 3
            wanted = [float(each.mean()), float(each.std() / 3**0.5), null]
            found = [float(columns[f"{field}{part}"][row]) for part in ("", "_stderr", "_null")]
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4), (row, field)


def test_the_last_layer_is_the_model():
    module = gpt2()
    columns = columns_of(module)
    losses = observe(find_language_model(module), TEXT, losses=True).losses
    assert columns["loss"][-1].item() == pytest.approx(losses[:, POSITIONS].mean().item(), rel=1e-5)
    assert columns["agreement"][-1].item() == 1
    assert columns["kl"][-1].item() == 0
    assert columns["kl"][0].item() > 0.1


def test_blocks_that_write_nothing_change_nothing():
    """What enters the first block is then what the model says, but for the block that writes."""
    torch.manual_seed(0)
    module = AttentionOnly(layers=3)
    with torch.no_grad():
        module.blocks[0].output.weight *= 20
        # A trace of a write, so that the blocks are still found.
        module.blocks[1].output.weight *= 1e-4
        module.blocks[2].output.weight *= 1e-4
    columns = columns_of(module)
    assert columns["kl"][1:].tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert columns["agreement"][1:].tolist() == [1] * 3
    assert columns["kl"][0].item() > 0.05


def test_layers_that_all_predict_the_same_agree_no_more_than_by_chance():
    torch.manual_seed(0)
    module = AttentionOnly()
    module.unembedding = torch.nn.Linear(64, 64)
    with torch.no_grad():
        module.unembedding.weight *= 1e-2
        module.unembedding.bias[7] = 5
    columns = columns_of(module)
    assert columns["agreement"].tolist() == columns["agreement_null"].tolist() == [1] * 3
    assert columns["loss"].tolist() == pytest.approx(columns["loss_null"].tolist(), rel=0.02)


def test_text_is_preferred_and_repeated_tokens_do_without():
    torch.manual_seed(0)
    module = AttentionOnly()
    with_text = measure(module, probes=["logit_lens"], text=torch.randint(64, (4, 64)))
    without = measure(module, probes=["logit_lens"])
    assert with_text["logit_lens"]["n"].tolist() == [4] * 3
    assert without["logit_lens"]["n"].tolist() == [16] * 3
    assert without["logit_lens"]["validity"].tolist() == ["ok"] * 3


def test_why_there_is_no_lens_is_said():
    seen = Observation(stimulus=TEXT, vocab_size=48, reasons={"lens": "no final norm"})
    columns = logit_lens.compute(Evidence(observations={"text": seen}))
    assert columns["validity"] == ["no final norm"]
    assert columns["loss"] is None
