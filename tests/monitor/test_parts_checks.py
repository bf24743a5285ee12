"""What the parts of a model must withstand: training, adapters, weights that are zero or not
trained yet, models without such parts, and being wrong.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.parts import activations, find_parts, verify
from tests.models import AttentionOnly, PlantedInduction
from tests.monitor.test_parts import (
    HEADS,
    LAYERS,
    TOKENS,
    WIDTH,
    Encoder,
    Nano,
    NanoBlock,
    close,
    found,
    hugging_face,
    randomised,
)
from tests.monitor.test_untouched import state


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return hugging_face("llama", "sdpa")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_the_weights_are_always_the_current_ones(family):
    model = hugging_face(family, "sdpa")
    parts = found(model)
    names = ("w_q", "w_k", "w_v", "w_o", "w_in", "w_out")
    before = [getattr(block, name).clone() for block in parts.blocks for name in names]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS).logits.logsumexp(-1).mean().backward()
    optimizer.step()
    after = [getattr(block, name) for block in parts.blocks for name in names]
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert verify(parts) == {}
    again = found(model)
    assert all(
        torch.equal(tensor, getattr(block, name))
        for tensor, (block, name) in zip(
            after, [(b, n) for b in again.blocks for n in names], strict=True
        )
    )
    assert not any(tensor.requires_grad for tensor in after)


def swapped(columns: Tensor) -> Tensor:
    return columns[[1, 0, *range(2, len(columns))]]


PROJECTIONS = ("query", "key", "value", "mixing")


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "olmo2"])
def test_heads_in_the_wrong_order_are_caught(family, name):
    parts = found(hugging_face(family, "sdpa"))
    part = getattr(parts.blocks[1], name)
    wrong = dataclasses.replace(part, columns=swapped(part.columns))
    blocks = (parts.blocks[0], dataclasses.replace(parts.blocks[1], **{name: wrong}))
    assert set(verify(dataclasses.replace(parts, blocks=blocks))) == {f"blocks.1.{name}"}


def test_what_is_gated_in_the_wrong_order_is_caught(llama):
    parts = found(llama)
    neurons = parts.blocks[1].neurons
    wrong = dataclasses.replace(neurons, up_columns=neurons.up_columns.roll(1))
    blocks = (parts.blocks[0], dataclasses.replace(parts.blocks[1], neurons=wrong))
    assert set(verify(dataclasses.replace(parts, blocks=blocks))) == {"blocks.1.neurons"}


@pytest.mark.parametrize("name", ["query", "key", "value", "mixing", "neurons"])
def test_parts_of_another_layer_are_caught(llama, name):
    parts = found(llama)
    first, second = parts.blocks
    blocks = (first, dataclasses.replace(second, **{name: getattr(first, name)}))
    assert f"blocks.1.{name}" in verify(dataclasses.replace(parts, blocks=blocks))


@pytest.mark.parametrize("name", ["attention_norm", "mlp_norm"])
def test_the_wrong_norm_is_caught(llama, name):
    parts = found(llama)
    for wrong in (None, getattr(parts.blocks[0], name)):
        block = dataclasses.replace(parts.blocks[1], **{name: wrong})
        tampered = dataclasses.replace(parts, blocks=(parts.blocks[0], block))
        assert set(verify(tampered)) == {f"blocks.1.{name}"}


@pytest.mark.parametrize("name", ["attention_write", "mlp_write"])
def test_a_missing_write_is_caught(llama, name):
    parts = found(llama)
    block = dataclasses.replace(parts.blocks[1], **{name: None})
    tampered = dataclasses.replace(parts, blocks=(parts.blocks[0], block))
    other = {"attention_write": "mlp_write", "mlp_write": "attention_write"}[name]
    assert f"blocks.1.{other}" in verify(tampered)


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        ({"embedding_scale": 1.1}, "embedding"),
        ({"final_norm": None}, "final_norm"),
        ({"logit_scale": 1.1}, "unembedding"),
        ({"logit_cap": 3.0}, "unembedding"),
    ],
)
def test_wrong_ends_are_caught(llama, wrong, caught):
    assert set(verify(dataclasses.replace(found(llama), **wrong))) == {caught}


def test_weights_copied_instead_of_read_are_caught():
    """As if somebody kept the matrices of an earlier step."""

    class Kept:
        def __init__(self, linear: Any) -> None:
            self.weights = [None if t is None else t.clone() for t in linear.read()]

        def read(self) -> Any:
            return self.weights

    model = hugging_face("llama", "sdpa")
    parts = found(model)
    block = parts.blocks[0]
    kept = dataclasses.replace(block.value, linear=Kept(block.value.linear))
    parts = dataclasses.replace(
        parts, blocks=(dataclasses.replace(block, value=kept), parts.blocks[1])
    )
    assert verify(parts) == {}
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] += 0.5
    assert set(verify(parts)) == {"blocks.0.value"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"]),
        ("llama", ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]),
    ],
)
def test_low_rank_adapters_are_part_of_the_weights(family, targets, trained, dtype):
    """Also where they are zero still, as at the first step."""
    import peft

    model = hugging_face(family, "sdpa").to(dtype)
    base = found(model).blocks[0]
    before = {name: getattr(base, name).clone() for name in ("w_q", "w_v", "w_o", "w_out")}
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=True, fan_in_fan_out=family == "gpt2"
    )
    model = peft.inject_adapter_in_model(config, model)

    def train() -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))

    if trained:
        train()
    parts = found(model.eval())
    if not trained:
        for name, weight in before.items():
            assert close(getattr(parts.blocks[0], name), weight)
        train()
    assert verify(parts) == {}
    for block in parts.blocks:
        assert block.reasons == {}
    for name, weight in before.items():
        assert not close(getattr(parts.blocks[0], name), weight)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma3", "olmo2"])
def test_a_model_that_was_not_trained_yet(family):
    """Norms are then alike; what is found must still hold when they no longer are."""
    import transformers

    from tests.monitor.test_parts import FAMILIES

    kind, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    parts = found(model)
    assert parts.reasons == {}
    assert all(block.reasons == {} for block in parts.blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert verify(parts) == {}


def test_what_writes_nothing_yet():
    model = randomised(lambda: Nano(flash=True))
    with torch.no_grad():
        for block in model.h:
            for linear in (block.attn.c_proj, block.down):
                linear.weight.zero_()
                linear.bias.zero_()
    parts = found(model)
    assert all(block.reasons == {} for block in parts.blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert verify(parts) == {}


def test_queries_that_are_zero_cannot_be_told_apart():
    model = randomised(lambda: Nano(flash=True))
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:WIDTH].zero_()
        model.h[0].attn.c_attn.bias[:WIDTH].zero_()
    first, second = found(model).blocks
    assert first.w_q is None
    assert "zero everywhere" in first.reasons["query"]
    assert first.w_k is not None
    assert second.reasons == {}


def test_a_mixture_of_experts_has_no_matrix():
    parts = found(hugging_face("mixtral", "sdpa"))
    for block in parts.blocks:
        assert block.w_out is None
        assert "mlp computes is no linear map" in block.reasons["neurons"]
        assert block.mlp_write is not None
        assert block.w_o is not None


def test_latent_attention_has_no_matrix_from_the_stream():
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=48,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=6,
        first_k_dense_replace=LAYERS,
    )
    parts = found(randomised(lambda: transformers.AutoModelForCausalLM.from_config(config)))
    for block in parts.blocks:
        assert block.w_q is None
        assert block.w_v is None
        assert "reads neither the residual stream nor a norm of it" in block.reasons["value"]
        assert block.w_o is not None
        assert block.w_out is not None


def test_a_value_that_is_normed_is_not_taken_for_its_matrix():
    class Normed(Nano):
        def __init__(self) -> None:
            super().__init__(flash=True)
            for block in self.h:
                block.attn.c_attn = nn.Sequential(block.attn.c_attn, nn.Tanh())

    for block in found(randomised(Normed)).blocks:
        assert block.w_v is None
        assert "c_attn computes is no linear map" in block.reasons["value"]


def test_matrices_that_are_no_modules():
    class Bare(NanoBlock):
        def __init__(self) -> None:
            super().__init__(flash=True, activation=nn.functional.gelu)
            self.w_in = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))
            self.w_out = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH))
            del self.up, self.down

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return x + self.activation(self.ln_2(x) @ self.w_in) @ self.w_out.T

    def build() -> Nano:
        model = Nano(flash=True)
        model.h = nn.ModuleList(Bare() for _ in range(LAYERS))
        return model

    model = randomised(build)
    for block, own in zip(found(model).blocks, model.h, strict=True):
        assert block.reasons == {}
        assert torch.equal(block.w_in, own.w_in)
        assert torch.equal(block.w_out, own.w_out.T)


def test_a_model_of_attention_alone():
    torch.manual_seed(0)
    parts = found(AttentionOnly())
    for block in parts.blocks:
        assert block.w_v is not None
        assert block.w_o is not None
        assert set(block.reasons) == {"mlp_write", "neurons"}


def test_a_model_without_blocks():
    parts = found(PlantedInduction(vocab_size=8, context=32, sharpness=20.0))
    assert parts.blocks == ()
    assert "not one in each member of a list" in parts.reasons["blocks"]
    assert parts.embedding.shape == (8, 8)


def test_logits_that_something_unknown_makes():
    class Squashed(Nano):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).sigmoid()

    parts = found(randomised(lambda: Squashed(flash=True)))
    assert parts.unembedding is None
    assert "nor that scaled or capped" in parts.reasons["unembedding"]
    with pytest.raises(
        ValueError, match="no logits without final norm and unembedding: final_norm"
    ):
        parts.logits(torch.zeros(1, WIDTH))
    assert all(block.reasons == {} for block in parts.blocks)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "mixtral"])
def test_everything_is_as_it_was(family):
    model = hugging_face(family, "sdpa").train()
    model.register_forward_hook(lambda *_: None)
    model(TOKENS).logits.logsumexp(-1).mean().backward()
    before = state(model)
    parts = found(model)
    activations(parts, TOKENS)
    for block in parts.blocks:
        _ = block.w_q, block.w_o, block.w_out
    assert verify(parts) == {}
    assert state(model) == before


def test_adapters_are_as_they_were():
    import peft

    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1),
        hugging_face("llama", "sdpa"),
    ).train()
    before = state(model)
    assert found(model).blocks[0].w_q is not None
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_other_types_of_numbers(family, dtype):
    parts = found(hugging_face(family, "sdpa").to(dtype))
    assert parts.reasons == {}
    for block in parts.blocks:
        assert block.reasons == {}
        assert block.w_q.dtype == dtype


def test_norms_on_the_stream_itself():
    (first, _) = found(randomised(lambda: Encoder(norm_first=False, batch_first=True))).blocks
    assert first.stream_norms == ("layers.layers.0.norm1", "layers.layers.0.norm2")
    assert first.attention_norm is None
    assert first.mlp_norm is None


def test_parallel_or_in_sequence():
    parallel = found(hugging_face("gpt_neox", "sdpa")).blocks[0]
    sequence = found(hugging_face("gpt_neox in sequence", "sdpa")).blocks[0]
    assert parallel.parallel
    assert not sequence.parallel
    assert parallel.mlp_norm == sequence.mlp_norm == "gpt_neox.layers.0.post_attention_layernorm"


def test_found_from_an_unwrapped_model():
    model = find_language_model(randomised(lambda: Nano(flash=True)))
    assert find_parts(model).model is model
