"""One pass over labelled tokens: what collectors are shown against what the model does, in which
order, and that an error in one is no other's.
"""

import dataclasses

import pytest
import torch

from monitor.anatomy import find_language_model
from monitor.features import collect, collecting
from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF
from monitor.parts import Parts, activations, find_parts
from monitor.stimuli import text_stimulus
from monitor.streams import UnseenError
from tests.models import gpt2
from tests.models.planted_direction import labelled


class Keeping:
    """Keeps everything, in the order in which it came."""

    sites = ("residual_before", "mlp_post")

    def __init__(self, parts, stimulus):
        self.seen, self.turned = [], []

    def see(self, site, layer, rows, chunk):
        self.seen.append((site, layer, rows.clone(), chunk))

    def turn(self, split):
        self.turned.append((split, len(self.seen)))

    def collected(self):
        return self


def failing(at, error):
    class Failing(Keeping):
        pass

    def raises(*args):
        raise error

    setattr(Failing, at, raises)
    return Failing


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return find_parts(find_language_model(gpt2()))


@pytest.fixture
def stimulus():
    whole = labelled(rows=10, context=24, vocab_size=48)
    # Two rows are padded, one of them to nothing but its first token.
    length = torch.tensor([24, 24, 9, 24, 24, 1, 24, 24, 24, 24])
    return dataclasses.replace(whole, labels=dataclasses.replace(whole.labels, length=length))


@pytest.mark.parametrize("at_once", [1, 60, 4096])
def test_every_used_token_is_shown_once_in_the_order_of_the_splits(
    at_once, parts, stimulus, monkeypatch
):
    monkeypatch.setattr(collecting, "_TOKENS", at_once)
    collected, reasons = collect(parts, stimulus, {"keeping": Keeping})
    assert reasons == {}
    kept, labels = collected["keeping"], stimulus.labels
    assert [split for split, _ in kept.turned] == [FIRST_HALF, SECOND_HALF, EVALUATION]
    splits = [chunk.split for *_, chunk in kept.seen]
    assert splits == sorted(splits)
    ends = dict(kept.turned)
    assert ends[FIRST_HALF] == splits.count(FIRST_HALF)
    exact = activations(parts, stimulus.tokens, sites=Keeping.sites)
    for (site, layer), whole in exact.items():
        if layer < 0:
            continue
        shown = torch.full((*stimulus.tokens.shape, whole.shape[-1]), torch.nan)
        times = torch.zeros(stimulus.tokens.shape)
        for at, number, rows, chunk in kept.seen:
            if (at, number) != (site, layer):
                continue
            assert (labels.split[chunk.row] == chunk.split).all()
            assert torch.equal(chunk.ids, stimulus.tokens[chunk.row, chunk.position])
            own = labels.values[:, chunk.row, chunk.position]
            assert torch.equal(chunk.of(labels.values), own)
            shown[chunk.row, chunk.position] = rows
            times[chunk.row, chunk.position] += 1
        assert torch.equal(times, labels.used.float())
        torch.testing.assert_close(shown[labels.used], whole[labels.used])


@pytest.mark.parametrize("at", ["__init__", "see", "turn", "collected"])
def test_what_cannot_go_on_is_named_and_nobody_else_is_disturbed(at, parts, stimulus):
    kinds = {
        "broken": failing(at, RuntimeError("it broke")),
        "blind": failing(at, UnseenError("there is nothing")),
        "keeping": Keeping,
    }
    collected, reasons = collect(parts, stimulus, kinds)
    assert reasons == {"broken": "RuntimeError: it broke", "blind": "there is nothing"}
    assert set(collected) == {"keeping"}
    alone, _ = collect(parts, stimulus, {"keeping": Keeping})
    assert len(alone["keeping"].seen) == len(collected["keeping"].seen)


def test_without_labels_or_blocks(parts, stimulus):
    with pytest.raises(ValueError, match="expected one with labels"):
        collect(parts, text_stimulus(stimulus.tokens), {"keeping": Keeping})
    none = Parts.none(parts.model, "it is too strange")
    collected, reasons = collect(none, stimulus, {"keeping": Keeping})
    assert collected == {}
    assert "it is too strange" in reasons["keeping"]
