"""Training dictionaries on a model: the model is left as it was, losses are those of a model with
something else in the place of its stream, and its untrained twin has its numbers in no order.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from monitor.anatomy import find_language_model
from monitor.concepts import concept_stimulus
from monitor.dictionary import Options, Training, observe_dictionaries, shuffled
from monitor.labels import EVALUATION
from monitor.parts import Parts, find_parts
from monitor.streams import UnseenError
from tests.models import AttentionOnly, gpt2
from tests.models.sparse_stream import CONTEXT, VOCABULARY, SparseStream, counting

BRIEF = Options(twins=1, training=Training(active=4, steps=8, seconds=None))


def stimulus_of(text, vocab_size=VOCABULARY):
    return concept_stimulus(
        (), text=text, context=text.shape[1], sequences=len(text), vocab_size=vocab_size, seed=0
    )


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    module = SparseStream()
    return module, find_parts(find_language_model(module)), stimulus_of(counting(24))


def test_losses_are_those_with_something_in_the_place_of_the_stream(subject):
    module, parts, stimulus = subject
    (told,), kept = observe_dictionaries(parts, stimulus, {}, BRIEF)
    assert told.layer == 1
    sae, losses = kept[0, 1].sae, told.model.losses
    rows = (stimulus.labels.split == EVALUATION).nonzero().flatten()
    fit = (stimulus.labels.split != EVALUATION).nonzero().flatten()
    streams = []
    module.blocks[1].register_forward_hook(lambda *call: streams.append(call[-1][:, 1:]))
    with torch.no_grad():
        module(stimulus.tokens[fit])
        mean = streams.pop().flatten(0, 1).mean(0)
    module.blocks[1]._forward_hooks.clear()
    places = {
        "model": lambda stream: stream,
        "zero": torch.zeros_like,
        "mean": mean.expand_as,
        "dictionary": lambda stream: sae.decode(sae.encode(stream.flatten(0, 1))).view_as(stream),
    }
    for name, exchange in places.items():

        def exchanged(_module, _args, stream, exchange=exchange):
            return torch.cat([stream[:, :1], exchange(stream[:, 1:])], 1)

        hook = module.blocks[1].register_forward_hook(exchanged)
        with torch.no_grad():
            logits = module(stimulus.tokens[rows])
        hook.remove()
        expected = F.cross_entropy(
            logits[:, 1:-1].mT, stimulus.tokens[rows][:, 2:], reduction="none"
        )
        torch.testing.assert_close(
            losses[name].float(), expected.sum(1), rtol=1e-3, atol=1e-3, msg=name
        )
    assert losses["predictions"].eq(CONTEXT - 2).all()


def test_the_model_is_left_as_it_was(subject):
    module, parts, stimulus = subject
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    places = {name: (p.data_ptr(), p._version) for name, p in module.named_parameters()}
    # A backward pass is under way.
    loss = module(stimulus.tokens[:2]).square().mean()
    expected = torch.autograd.grad(loss, module.token.weight, retain_graph=True)
    state, modes = torch.get_rng_state(), [m.training for m in module.modules()]
    observe_dictionaries(parts, stimulus, {}, BRIEF)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in module.modules()]
    assert torch.is_grad_enabled()
    for name, p in module.named_parameters():
        assert torch.equal(p, weights[name]), name
        assert (p.data_ptr(), p._version) == places[name], name
        assert p.grad is None, name
    assert torch.equal(torch.autograd.grad(loss, module.token.weight)[0], expected[0])


def test_a_twin_has_the_same_numbers_in_no_order_and_only_inside():
    torch.manual_seed(0)
    module = gpt2()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    twins = []
    for seed in (1, 2, 1):
        with shuffled(module, seed):
            twins.append({name: p.detach().clone() for name, p in module.named_parameters()})
    for name, weight in before.items():
        first, other, again = (twin[name] for twin in twins)
        assert torch.equal(first, again)
        if weight.ndim > 1:
            assert torch.equal(first.flatten().sort().values, weight.flatten().sort().values)
            assert (first == weight).float().mean() < 0.1
            assert (first == other).float().mean() < 0.1
        else:
            assert torch.equal(first, weight)
    with pytest.raises(RuntimeError, match="broken"), shuffled(module, 1):
        raise RuntimeError("broken")
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_it_goes_on_from_the_earlier_dictionary(subject):
    _, parts, stimulus = subject
    (first,), kept = observe_dictionaries(parts, stimulus, {}, BRIEF)
    assert first.model.cosine is None
    assert first.model.fired is None
    (second,), then = observe_dictionaries(parts, stimulus, kept, BRIEF)
    for whose, seen in ((0, second.model), (1, second.twins[0])):
        here, there = then[whose, 1], kept[whose, 1]
        torch.testing.assert_close(seen.cosine, (here.sae.decoder * there.sae.decoder).sum(1))
        assert seen.cosine.mean() > 0.9
        assert torch.equal(seen.fired, there.fired)
        assert torch.equal(here.fired, seen.fires.sum(0) > 0)
    assert second.model.residual.sum() < first.model.residual.sum()


def test_no_more_tokens_than_asked_for_and_one_training_for_model_and_twin(subject):
    _, parts, stimulus = subject
    few = dataclasses.replace(BRIEF, tokens=128, layers=(0, 2), twins=2)
    few = dataclasses.replace(few, training=Training(active=4, seconds=0.0))
    told, kept = observe_dictionaries(parts, stimulus, {}, few)
    assert [layer.layer for layer in told] == [0, 2]
    assert kept.keys() == {(whose, layer) for whose in range(3) for layer in (0, 2)}
    # 4 x 128 firings, 64 for each latent.
    assert all(learned.sae.decoder.shape == (8, 32) for learned in kept.values())
    assert {seen.steps for layer in told for seen in (layer.model, *layer.twins)} == {1}


def test_in_inference_mode_it_can_go_on_later(subject):
    _, parts, stimulus = subject
    with torch.inference_mode():
        _, kept = observe_dictionaries(parts, stimulus, {}, BRIEF)
    observe_dictionaries(parts, stimulus, kept, BRIEF)


def test_reasons_why_there_is_none(subject):
    _, parts, stimulus = subject
    nothing = Parts.none(parts.model, "every process holds only a part of its weights")
    with pytest.raises(UnseenError, match="blocks: every process holds only a part"):
        observe_dictionaries(nothing, stimulus, {}, BRIEF)
    fit_alone = dataclasses.replace(stimulus.labels, split=torch.zeros_like(stimulus.labels.split))
    with pytest.raises(UnseenError, match="0 sequences to evaluate on: at least 2"):
        observe_dictionaries(parts, dataclasses.replace(stimulus, labels=fit_alone), {}, BRIEF)
    with pytest.raises(UnseenError, match="tokens to train on: at least 64"):
        observe_dictionaries(parts, stimulus_of(counting(24)[:, :4]), {}, BRIEF)
    with pytest.raises(ValueError, match=r"layers=\[3\]: the model has 3 blocks"):
        observe_dictionaries(parts, stimulus, {}, dataclasses.replace(BRIEF, layers=(3,)))


def test_a_stream_that_is_not_finite():
    torch.manual_seed(0)
    module = AttentionOnly()
    parts = find_parts(find_language_model(module))
    with torch.no_grad():
        module.token.weight.fill_(torch.nan)
    text = torch.randint(64, (12, 32))
    with pytest.raises(UnseenError, match="not finite"):
        observe_dictionaries(parts, stimulus_of(text, 64), {}, BRIEF)


def test_texts_of_one_token_and_padding_do_not_count(subject):
    _, parts, stimulus = subject
    (whole,), _ = observe_dictionaries(parts, stimulus, {}, BRIEF)
    length = stimulus.labels.length.clone()
    first, second, *_ = (stimulus.labels.split == EVALUATION).nonzero().flatten().tolist()
    length[first], length[second] = 1, 2
    labels = dataclasses.replace(stimulus.labels, length=length)
    short = dataclasses.replace(stimulus, labels=labels)
    (told,), _ = observe_dictionaries(parts, short, {}, BRIEF)
    assert told.model.tokens.tolist() == [1, *whole.model.tokens.tolist()[2:]]
    assert told.model.losses["predictions"][0] == told.model.losses["model"][0] == 0
    torch.testing.assert_close(told.model.losses["model"][1:], whole.model.losses["model"][2:])
