"""The parts of models of many kinds, rebuilt by hand into what the models compute.

Attention patterns come from the models themselves, or a full softmax; everything else from the
parts. Weights, biases and norms are random, so that a part taken for another shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from monitor.anatomy import find_language_model
from monitor.parts import Block, Parts, activations, find_parts

pytestmark = [
    # What transformers asks of FlexAttention, and what that imports, is deprecated in torch.
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
]

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 48, 32, 32, 2, 4
SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
GROUPED = {**SIZES, "num_key_value_heads": HEADS // 2}
WIDE_HEADS = {**GROUPED, "head_dim": 12}
SEVEN_HEADS = {
    **SIZES,
    "hidden_size": 42,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "head_dim": 6,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT2, "n_head": HEADS}),
    "llama": ("Llama", GROUPED),
    "llama with biases": ("Llama", {**WIDE_HEADS, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 5}),
    "phi3": ("Phi3", {**GROUPED, "pad_token_id": 0}),
    "qwen3": ("Qwen3", WIDE_HEADS),
    "gpt_neox": ("GPTNeoX", SIZES),
    "gpt_neox in sequence": ("GPTNeoX", {**SIZES, "use_parallel_residual": False}),
    "gemma2": ("Gemma2", {**WIDE_HEADS, "sliding_window": 5}),
    "gemma3": ("Gemma3Text", {**WIDE_HEADS, "sliding_window": 5}),
    "seven heads": ("Gemma3Text", SEVEN_HEADS),
    "olmo2": ("Olmo2", GROUPED),
    "phi": ("Phi", {**SIZES, "partial_rotary_factor": 0.5}),
    "granite": ("Granite", {**GROUPED, "residual_multiplier": 0.3, "logits_scaling": 4.0}),
    "opt": ("OPT", {**SIZES, "ffn_dim": WIDTH, "word_embed_proj_dim": WIDTH}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 4}),
    "mixtral": ("Mixtral", {**GROUPED, "num_local_experts": 4}),
}
MIXTURES = {"mixtral"}
TOKENS = torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))


def hugging_face(family: str, implementation: str) -> nn.Module:
    import transformers

    kind, sizes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=0, eos_token_id=1)
    return randomised(
        lambda: transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )
    )


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Far from how it is initialised, biases and norms too; the same for every like model."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


class Nano(nn.Module):
    """As nanoGPT writes it: positions learned, one projection, attention by hand or not."""

    def __init__(self, *, flash: bool, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(NanoBlock(flash=flash, activation=activation) for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class NanoBlock(nn.Module):
    def __init__(self, *, flash: bool, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.activation = NanoAttention(flash=flash), activation
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        # In place, so that what was read is not what is there later.
        x = x.clone()
        x += self.attn(self.ln_1(x))
        x += self.down(self.activation(self.up(self.ln_2(x))))
        return x


class NanoAttention(nn.Module):
    def __init__(self, *, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.flash = flash

    def forward(self, x: Tensor) -> Tensor:
        heads = (rearrange(t, "b p (h d) -> b h p d", h=HEADS) for t in self.c_attn(x).chunk(3, -1))
        q, k, v = heads
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q / math.sqrt(q.shape[-1])) @ k.mT
            hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
        return self.c_proj(rearrange(y, "b h p d -> b p (h d)"))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask."""

    def __init__(self, *, norm_first: bool, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, norm_first=norm_first, batch_first=batch_first
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.unembedding = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layers(x, mask=mask, is_causal=True)
        return self.unembedding(x if self.batch_first else x.transpose(0, 1))


OWN: dict[str, Callable[[], nn.Module]] = {
    "nano flash": lambda: Nano(flash=True),
    "nano by hand": lambda: Nano(flash=False),
    "nano squared relu": lambda: Nano(flash=True, activation=lambda x: F.relu(x).square()),
    "encoder": lambda: Encoder(norm_first=True, batch_first=True),
    "encoder, positions first": lambda: Encoder(norm_first=True, batch_first=False),
    "encoder, norms last": lambda: Encoder(norm_first=False, batch_first=True),
    "encoder, norms last, positions first": lambda: Encoder(norm_first=False, batch_first=False),
}
EAGER_ONLY = {"bloom", "gemma2"}
ALL = [
    *((family, "eager") for family in FAMILIES),
    *((family, "sdpa") for family in FAMILIES if family not in EAGER_ONLY),
    *((name, "own") for name in OWN),
    ("llama", "flex_attention"),
    ("gemma2", "flex_attention"),
]


def build(name: str, how: str) -> nn.Module:
    return randomised(OWN[name]) if how == "own" else hugging_face(name, how)


def found(model: nn.Module) -> Parts:
    return find_parts(find_language_model(model))


def close(one: Tensor, other: Tensor) -> bool:
    within = 1e-4 if other.dtype == torch.float32 else 1e-2
    return torch.allclose(one, other, rtol=within, atol=within * float(other.abs().max()))


def apply(parts: Parts, path: str | None, given: Tensor) -> Tensor:
    return given if path is None else parts.model.module.get_submodule(path)(given)


@torch.no_grad()
def patterns(name: str, how: str, seen: dict) -> list[Tensor]:
    """The model's own where it returns them, else a full softmax."""
    if how != "own":
        output = hugging_face(name, "eager")(TOKENS, output_attentions=True, use_cache=False)
        return list(output.attentions)
    made = []
    for layer in range(LAYERS):
        query, key = seen["query", layer], seen["key", layer]
        scores = query @ key.mT
        if name != "nano by hand":
            scores = scores / math.sqrt(query.shape[-1])
        hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        made.append(scores.masked_fill(hidden, -math.inf).softmax(-1))
    return made


def attention_of(parts: Parts, block: Block, stream: Tensor, pattern: Tensor) -> Tensor:
    """What is added to the stream, head by head."""
    read = apply(parts, block.attention_norm, stream)
    written = block.b_o.clone().expand_as(stream).clone()
    for head in range(block.heads):
        values = read @ block.w_v[head] + block.b_v[head]
        written += (pattern[:, head] @ values) @ block.w_o[head]
    return block.attention_write.scale * apply(parts, block.attention_write.norm, written)


def mlp_of(parts: Parts, block: Block, seen: dict) -> Tensor:
    if block.neurons is None:
        return block.mlp_write.scale * seen["mlp_write", block.layer]
    written = seen["mlp_post", block.layer] @ block.w_out + block.b_out
    return block.mlp_write.scale * apply(parts, block.mlp_write.norm, written)


@pytest.mark.parametrize(("name", "how"), ALL)
@torch.no_grad()
def test_the_parts_rebuild_the_logits(name, how):
    model = build(name, how)
    parts = found(model)
    assert parts.reasons == {}
    seen = activations(parts, TOKENS)
    stream = parts.embedding[TOKENS]
    if parts.embedding_norm is not None:
        stream = apply(parts, parts.embedding_norm, stream)
    # What depends on the position alone is no part.
    positions = (seen["residual_before", 0] - stream)[:1]
    assert close(stream + positions, seen["residual_before", 0])
    stream = stream + positions
    for block, pattern in zip(parts.blocks, patterns(name, how, seen), strict=True):
        reasons = {
            k: why for k, why in block.reasons.items() if (k, name) != ("neurons", "mixtral")
        }
        assert reasons == {}
        assert (block.neurons is None) == (name in MIXTURES)
        assert close(stream, seen["residual_before", block.layer])
        attention, mlp = attention_of(parts, block, stream, pattern), mlp_of(parts, block, seen)
        if block.stream_norms is None:
            stream = stream + attention + mlp
        else:
            first, second = block.stream_norms
            stream = apply(parts, second, apply(parts, first, stream + attention) + mlp)
        assert close(stream, seen["residual_after", block.layer])
    logits = apply(parts, parts.final_norm, stream) @ parts.unembedding.T + parts.unembedding_bias
    logits = parts.logit_scale * logits
    if parts.logit_cap is not None:
        logits = parts.logit_cap * (logits / parts.logit_cap).tanh()
    assert close(logits, parts.model.logits(TOKENS))
    assert close(parts.logits(stream), logits)


@pytest.mark.parametrize(("name", "how"), ALL)
@torch.no_grad()
def test_queries_keys_and_neurons(name, how):
    """At the first position, where a rotation is none; through the model's own norms on them."""
    parts = found(build(name, how))
    seen = activations(parts, TOKENS)
    for block in parts.blocks:
        read = seen["attention_input", block.layer]
        for kind, weight, bias in (
            ("query", block.w_q, block.b_q),
            ("key", block.w_k, block.b_k),
            ("value", block.w_v, block.b_v),
        ):
            projection = getattr(block, kind)
            made = torch.stack([read @ w + b for w, b in zip(weight, bias, strict=True)], dim=1)
            own = seen[kind, block.layer]
            own = own.repeat_interleave(block.heads // own.shape[1], dim=1)
            if kind != "value":
                made, own = made[:, :, :1], own[:, :, :1]
            if projection.norm is not None:
                norm = parts.model.module.get_submodule(projection.norm)
                if norm.weight.shape[0] == made.shape[-1]:
                    made = norm(made)
                else:
                    # One norm over all heads of the keys: without those that repeat them.
                    every = made.shape[-1] * block.heads // norm.weight.shape[0]
                    whole = rearrange(made[:, ::every], "b h p d -> b p (h d)")
                    made = rearrange(norm(whole), "b p (h d) -> b h p d", h=block.heads // every)
                    made = made.repeat_interleave(every, dim=1)
            assert close(projection.scale * made, own)
        if name not in MIXTURES:
            read = seen["mlp_input", block.layer]
            gated = block.w_gate is not None
            pre = read @ block.w_gate + block.b_gate if gated else read @ block.w_in + block.b_in
            assert close(pre, seen["mlp_pre", block.layer])


@pytest.mark.parametrize(("name", "gated"), [("llama", F.silu), ("gpt2", None), ("phi3", F.silu)])
@torch.no_grad()
def test_activations_of_the_neurons(name, gated):
    parts = found(hugging_face(name, "sdpa"))
    seen = activations(parts, TOKENS, layers=[1])
    (block,) = parts.blocks[1:]
    if gated is None:
        post = F.gelu(seen["mlp_pre", 1], approximate="tanh")
    else:
        post = gated(seen["mlp_pre", 1]) * (seen["mlp_input", 1] @ block.w_in + block.b_in)
    assert close(post, seen["mlp_post", 1])


def test_weights_are_those_of_the_known_layout():
    model = hugging_face("gpt2", "sdpa")
    block = found(model).blocks[1]
    attn = model.transformer.h[1].attn
    query, key, value = attn.c_attn.weight.split(WIDTH, dim=1)
    for own, ours in ((query, block.w_q), (key, block.w_k), (value, block.w_v)):
        assert torch.equal(ours, rearrange(own, "f (h d) -> h f d", h=HEADS))
    assert torch.equal(block.w_o, rearrange(attn.c_proj.weight, "(h d) f -> h d f", h=HEADS))
    assert torch.equal(block.w_in, model.transformer.h[1].mlp.c_fc.weight)
    assert torch.equal(block.b_out, model.transformer.h[1].mlp.c_proj.bias)


def test_sizes_that_could_be_mistaken():
    """As many positions as sequences, as heads, as features of a head."""
    for name in ("encoder, positions first", "nano by hand"):
        parts = found(build(name, "own"))
        tokens = TOKENS[:, :4].repeat(2, 1)[:4]
        alone = activations(parts, tokens[:3])
        together = activations(parts, tokens)
        assert set(alone) == set(together)
        for key, tensor in alone.items():
            assert close(together[key][:3], tensor)
