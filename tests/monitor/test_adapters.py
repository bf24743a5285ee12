"""Attention that a user's adapter reads: the same as where it is recognised, whatever the module
calls inside; and what is said where the adapter is of no use.
"""

import functools

import pytest
import torch
from torch import nn

from monitor.anatomy import find_language_model
from monitor.attention import Pattern, SelfAttention
from monitor.capture import NoAttentionError, observe
from monitor.measure import measure
from monitor.stimuli import repeated
from tests.models import AttentionBlock, AttentionOnly, Bigram, attend_by_sums, attend_causally

STIMULUS = repeated(vocab_size=64, sequences=4, context=48, bos=None, seed=0)


def read_projections(module, args, kwargs, output):
    query, key, _ = module.projected(args[0])
    return SelfAttention(query=query, key=key, is_causal=True)


def read_pattern(module, args, kwargs, output):
    query, key, _ = module.projected(args[0])
    later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return Pattern(weights=scores.masked_fill(later, float("-inf")).softmax(-1))


def built(attend) -> AttentionOnly:
    torch.manual_seed(0)
    return AttentionOnly(attend=attend)


@pytest.fixture(scope="module")
def recognised():
    return observe(find_language_model(built(attend_causally)), STIMULUS, attention=True).attention


@pytest.mark.parametrize("read", [read_projections, read_pattern])
@pytest.mark.parametrize("attend", [attend_by_sums, attend_causally])
@pytest.mark.parametrize("calls", [None, 2])
def test_an_adapter_reads_what_would_be_recognised(recognised, read, attend, calls):
    model = find_language_model(built(attend), adapters={AttentionBlock: read})
    seen = observe(model, STIMULUS, attention=True, attention_calls=calls).attention
    assert [(layer.layer, layer.module) for layer in seen] == [(0, "blocks.0"), (1, "blocks.1")]
    for one, other in zip(seen, recognised, strict=True):
        assert one.causal
        torch.testing.assert_close(one.entropy, other.entropy, atol=1e-4, rtol=0)
        for name in STIMULUS.targets:
            torch.testing.assert_close(one.mass[name], other.mass[name], atol=1e-5, rtol=0)
            torch.testing.assert_close(one.uniform[name], other.uniform[name])


def test_nothing_is_left_on_the_modules():
    model = built(attend_by_sums)
    mine = functools.partial(model.blocks[1].forward)
    model.blocks[1].forward = mine
    before = [dict(vars(module)) for module in model.modules()]
    found = find_language_model(model, adapters={AttentionBlock: read_pattern})
    observe(found, STIMULUS, attention=True, attention_calls=1)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_losses_alone_need_no_adapter():
    def fail(module, args, kwargs, output):
        raise AssertionError("nobody asked for attention")

    found = find_language_model(built(attend_causally), adapters={AttentionBlock: fail})
    assert observe(found, STIMULUS, losses=True).losses is not None


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = built(attend_by_sums)

    def forward(self, tokens, *, scale):
        return scale * self.inner(tokens)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer()
        self.unembedding = nn.Linear(64, 64)

    def forward(self, tokens):
        return self.unembedding(self.outer(tokens, scale=2))


def test_of_modules_within_each_other_the_outermost_is_read_with_its_keywords():
    seen = []

    def read(module, args, kwargs, output):
        seen.append((type(module).__name__, kwargs, output.shape))
        return Pattern(weights=torch.eye(48).expand(4, 3, -1, -1))

    found = find_language_model(Keyword(), adapters={AttentionBlock: read_pattern, Outer: read})
    layers = observe(found, STIMULUS, attention=True).attention
    assert seen == [("Outer", {"scale": 2}, (4, 48, 64))]
    assert [layer.module for layer in layers] == ["outer"]
    # Every head looks at its own position alone.
    assert layers[0].mass["first_token"].eq(0).all()
    assert layers[0].entropy.eq(0).all()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "the adapter for AttentionBlock returned NoneType; expected a .*Pattern or"),
        (Pattern(weights=torch.ones(4, 2, 48, 48)), "rows that sum to 48; expected"),
        (Pattern(weights=-torch.eye(48).expand(4, 2, -1, -1)), "weights down to -1 and rows"),
        (
            Pattern(weights=torch.eye(47).expand(4, 2, -1, -1)),
            r"shape \[4, 2, 47, 47\]; expected \[4, head, 48, 48\]",
        ),
        (
            SelfAttention(query=torch.ones(4, 48, 2, 8), key=torch.ones(4, 48, 2, 8)),
            r"shape \[4, 48, 2, 8\]; expected \[4, head, 48, feature\]",
        ),
    ],
    ids=["nothing", "no softmax", "scores", "other positions", "heads after positions"],
)
def test_an_adapter_that_returns_something_else(returned, message):
    adapters = {AttentionBlock: lambda module, args, kwargs, output: returned}
    model = find_language_model(built(attend_by_sums), adapters=adapters)
    with pytest.raises(NoAttentionError, match=message):
        observe(model, STIMULUS, attention=True)


def test_an_error_in_an_adapter_waits_for_the_end_of_a_pass_that_others_wait_for():
    def fail(module, args, kwargs, output):
        raise KeyError("no such thing")

    model = find_language_model(built(attend_causally), adapters={AttentionBlock: fail})
    ran = []
    model.module.unembedding.register_forward_hook(lambda *_: ran.append("to the end"))
    for together, expected in ((False, []), (True, ["to the end"])):
        with pytest.raises(KeyError, match="no such thing"):
            observe(model, STIMULUS, attention=True, together=together)
        assert ran == expected


@pytest.mark.parametrize("adapters", [[AttentionBlock], {"blocks": read_pattern}, {nn.Linear: 3}])
def test_what_are_no_adapters(adapters):
    with pytest.raises(TypeError, match=r"adapters.*expected a dictionary from classes of modules"):
        find_language_model(built(attend_causally), adapters=adapters)


def test_where_nothing_can_be_seen_the_module_and_what_to_write_are_named():
    model = find_language_model(built(attend_by_sums))
    with pytest.raises(NoAttentionError) as error:
        observe(model, STIMULUS, attention=True)
    message = str(error.value)
    assert "its module blocks.0 (AttentionBlock) mixes positions" in message
    # What it shows works when its dots are filled in.
    lines = [line.strip() for line in message.splitlines() if line.startswith("    ")]
    assert len(lines) == 5
    code = "\n".join([lines[0], lines[1], f"    {lines[2]}", f"    {lines[3]}"])
    code = code.replace("weights = ...", "weights = read_pattern(module, args, {}, output).weights")
    names = {"read_pattern": read_pattern}
    exec(code, names)  # the lines are the message's own
    assert "adapters={AttentionBlock: read}" in lines[4]
    mended = find_language_model(model.module, adapters={AttentionBlock: names["read"]})
    assert observe(mended, STIMULUS, attention=True).attention is not None


def test_layers_of_which_nothing_was_seen_are_named(caplog):
    model = built(attend_causally)
    measure(model, probes=["induction"], context=48)
    assert not caplog.records
    model.blocks[0].attend = attend_by_sums
    assert measure(model, probes=["induction"], context=48)["induction"]["layer"].unique() == [1]
    (said,) = {record.getMessage() for record in caplog.records}
    assert said.startswith("1 layers showed their attention, but none was seen in blocks.0: these")


class Gated(AttentionOnly):
    """A gate over positions of the shape of attention, and logits of it too."""

    def __init__(self) -> None:
        super().__init__(vocab_size=64, context=64)
        self.gate = nn.Linear(64, 64)

    def forward(self, tokens):
        residual = self.token(tokens)
        residual = residual + (
            self.gate(residual).softmax(-1) @ residual if tokens.shape[1] == 64 else 0
        )
        for block in self.blocks:
            residual = residual + block(residual)
        return self.unembedding(residual).softmax(-1).log()


def test_a_softmax_of_the_same_shape_is_no_attention():
    stimulus = repeated(vocab_size=64, sequences=4, context=64, bos=None, seed=0)
    seen = observe(find_language_model(Gated()), stimulus, attention=True).attention
    assert [layer.module for layer in seen] == ["blocks.0", "blocks.1"]


def attend_with_one_head(query, key, value):
    later = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    scores = (query @ key.mT).flatten(0, 1).masked_fill(later, -1e30)
    return (scores.softmax(-1) @ value.flatten(0, 1)).unflatten(0, (len(query), -1))


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_without_a_dimension_of_heads(heads):
    model = AttentionOnly(heads=heads, attend=attend_with_one_head)
    seen = observe(find_language_model(model), STIMULUS, attention=True).attention
    assert [layer.entropy.shape for layer in seen] == [(4, heads)] * 2
    assert all(layer.causal for layer in seen)


def test_a_model_that_mixes_nothing_is_told_so():
    with pytest.raises(NoAttentionError, match=r"Bigram showed no attention: in one forward pass"):
        observe(find_language_model(Bigram()), STIMULUS, attention=True)


def test_a_sink_that_is_no_token_takes_its_share():
    """GPT-OSS: a learned logit beside the keys, whose weight goes nowhere."""
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "num_attention_heads": 4}
    config = GptOssConfig(
        **sizes,
        vocab_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        num_local_experts=2,
        num_experts_per_tok=1,
        bos_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    module = GptOssForCausalLM(config).eval()

    def read(module, args, kwargs, output):
        return Pattern(weights=output[1])

    seen = observe(
        find_language_model(module, adapters={GptOssAttention: read}), STIMULUS, attention=True
    ).attention
    with torch.no_grad():
        patterns = module(STIMULUS.tokens, output_attentions=True).attentions
    assert len(seen) == 2
    for layer, pattern in zip(seen, patterns, strict=True):
        assert layer.causal
        assert pattern.sum(-1).lt(0.99).any()
        first = pattern[..., 0].sum(-1) - pattern[..., 0, 0]
        torch.testing.assert_close(layer.mass["first_token"], first, atol=1e-5, rtol=0)
