"""The inner products of words: against the model's own stream, word by word, however the sequences
are cut into passes.
"""

import pytest
import torch

import monitor.features.collecting as collecting
from monitor.analogies import Analogies, analogies_stimulus
from monitor.anatomy import find_language_model
from monitor.features import COLLECTORS, collect
from monitor.parts import activations, find_parts
from tests.models import gpt2
from tests.models.planted_words import GENDER, ROYALTY

KIND = {"analogies": COLLECTORS["analogies"]}


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return find_parts(find_language_model(gpt2()))


def words(vocab_size=48):
    given = [Analogies("royalty", quadruples=ROYALTY), Analogies("gender", quadruples=GENDER)]
    return analogies_stimulus(given, bos=None, context=16, vocab_size=vocab_size)


def test_products_are_those_of_the_stream_at_each_word(parts):
    found, reasons = collect(parts, words(), KIND)
    products = found["analogies"]
    assert reasons == {}
    assert products.ids.tolist() == list(range(1, 9))
    assert products.layers == (-1, 0, 1)
    tokens = torch.tensor([[0, word] for word in range(1, 9)])
    seen = activations(parts, tokens, sites=["residual_before", "residual_after"])
    stream = [seen["residual_before", 0], seen["residual_after", 0], seen["residual_after", 1]]
    for layer, rows in enumerate(stream):
        for one in range(8):
            for other in range(8):
                expected = float(rows[one, 1].double() @ rows[other, 1].double())
                assert products.products[layer, one, other] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens_at_once", [2, 6, 10])
def test_how_sequences_are_cut_into_passes_does_not_matter(parts, monkeypatch, tokens_at_once):
    whole = collect(parts, words(), KIND)[0]["analogies"]
    monkeypatch.setattr(collecting, "_TOKENS", tokens_at_once)
    cut = collect(parts, words(), KIND)[0]["analogies"]
    assert cut.ids.equal(whole.ids)
    torch.testing.assert_close(cut.products, whole.products, rtol=1e-5, atol=1e-5)


def test_digits_of_small_differences_beside_a_large_mean_are_kept(parts):
    collector = KIND["analogies"](parts, words())
    vectors = 1000 + torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    stimulus = words()
    row = torch.arange(len(stimulus.tokens))
    chunk = collecting.Chunk(
        split=2, row=row, position=torch.ones_like(row), ids=stimulus.tokens[:, 1]
    )
    for site, layer in (("residual_before", 0), ("residual_after", 0), ("residual_after", 1)):
        collector.see(site, layer, vectors[chunk.ids], chunk)
    products = collector.collected().products[0]
    difference = products[0, 0] - products[0, 1] - products[1, 0] + products[1, 1]
    expected = (vectors[1].double() - vectors[2].double()).square().sum()
    assert difference.item() == pytest.approx(expected.item(), rel=1e-7)


def test_a_layer_that_was_not_seen_is_told(parts):
    collector = KIND["analogies"](parts, words())
    with pytest.raises(Exception, match=r"layers \[-1, 0, 1\] was not seen"):
        collector.collected()
