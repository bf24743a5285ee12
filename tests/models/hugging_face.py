"""Hugging Face's model families with random weights, in tiny sizes.

Every builder takes the attention implementation and any option of the family's configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Sizes that all families share; Grouped queries share the heads of the keys in twos.
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 48, 64, 32, 2, 4
KEYHEADS = HEADS // 2

# Shorter than any context that is measured, and longer than the shortest period.
WINDOW = 10

# The sizes under the names that most families call them by.
_SIZES = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": KEYHEADS}
_LOCAL_AND_GLOBAL = {
    **_GROUPED,
    "head_dim": WIDTH // HEADS,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": WIDTH // HEADS,
}

# Far above the usual 0.02: attention of random weights is then far from uniform.
_SPREAD = {"initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}


def _built(kind: str, implementation: str, sizes: dict[str, Any], options: dict) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**{**sizes, **_SPREAD, **options})
    # Forked, so that a test's own random stream does not depend on what it builds.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=implementation
        )


def gpt2(implementation: str = "sdpa", **options: Any) -> nn.Module:
    sizes = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return _built("GPT2", implementation, {"vocab_size": VOCABULARY, **sizes}, options)


def llama(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """With two query heads for each head of the keys."""
    return _built("Llama", implementation, _GROUPED, options)


def mistral(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Every layer sees a window that is shorter than the context."""
    return _built("Mistral", implementation, {**_GROUPED, "sliding_window": WINDOW}, options)


def qwen3(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Queries and keys are normalised before they are rotated."""
    return _built("Qwen3", implementation, {**_GROUPED, "head_dim": WIDTH // HEADS}, options)


def gpt_neox(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Attention and MLP read the same residual stream; one projection for queries, keys, values."""
    return _built("GPTNeoX", implementation, _SIZES, options)


def gemma2(implementation: str = "eager", **options: Any) -> nn.Module:
    """Scores are capped by a tanh (which `sdpa` cannot do); local and global layers."""
    capped = {**_LOCAL_AND_GLOBAL, "attn_logit_softcapping": 5.0}
    return _built("Gemma2", implementation, capped, options)


def gemma3(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Local and global layers, normalised queries and keys."""
    return _built("Gemma3Text", implementation, _LOCAL_AND_GLOBAL, options)


def olmo2(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Queries and keys are normalised over all heads at once; norms come after, not before."""
    return _built("Olmo2", implementation, _GROUPED, options)


def phi(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Half of the features are rotated; attention and MLP in parallel."""
    return _built("Phi", implementation, {**_SIZES, "partial_rotary_factor": 0.5}, options)


def mixtral(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """A mixture of experts, whose router has a softmax of its own."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return _built("Mixtral", implementation, {**_GROUPED, **experts}, options)


def qwen3_moe(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """As many experts as there are positions in the tests: the router's softmax is as wide."""
    experts = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    sizes = {**_GROUPED, "head_dim": WIDTH // HEADS, **experts}
    return _built("Qwen3Moe", implementation, sizes, options)


def deepseek_v3(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """Latent attention: values are narrower than queries and keys."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": HEADS}
    latent["first_k_dense_replace"] = LAYERS
    features = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6}
    return _built("DeepseekV3", implementation, {**_SIZES, **latent, **features}, options)


def bloom(implementation: str = "eager", **options: Any) -> nn.Module:
    """Linear biases by distance (ALiBi), by `baddbmm`; its attention has one implementation."""
    sizes = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    return _built("Bloom", implementation, {"vocab_size": VOCABULARY, **sizes}, options)


def mpt(implementation: str = "eager", **options: Any) -> nn.Module:
    """Linear biases by distance (ALiBi)."""
    sizes = {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": CONTEXT}
    return _built("Mpt", implementation, {"vocab_size": VOCABULARY, **sizes}, options)


def falcon(implementation: str = "sdpa", **options: Any) -> nn.Module:
    """One head of keys for all queries."""
    return _built("Falcon", implementation, {**_SIZES, "multi_query": True}, options)


def gptj(implementation: str = "eager", **options: Any) -> nn.Module:
    sizes = {"n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    sizes |= {"vocab_size": VOCABULARY, "rotary_dim": 4}
    return _built("GPTJ", implementation, sizes, options)


def gpt_neo(implementation: str = "eager", **options: Any) -> nn.Module:
    """A global and a local layer; scores are not scaled."""
    sizes = {**_SIZES, "num_layers": LAYERS, "num_heads": HEADS, "window_size": WINDOW}
    for renamed in ("num_hidden_layers", "num_attention_heads"):
        del sizes[renamed]
    sizes["attention_types"] = [[["global", "local"], 1]]
    return _built("GPTNeo", implementation, sizes, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A builder, the attention implementations it takes, and the window of each layer."""

    build: Callable[..., nn.Module]
    implementations: tuple[str, ...] = ("sdpa", "eager")
    windows: tuple[int | None, ...] = (None,) * LAYERS


FAMILIES = {
    "gpt2": Family(build=gpt2),
    "llama": Family(build=llama, implementations=("sdpa", "eager", "flex_attention")),
    "mistral": Family(build=mistral, windows=(WINDOW, WINDOW)),
    "qwen3": Family(build=qwen3),
    "gpt_neox": Family(build=gpt_neox),
    "gemma2": Family(
        build=gemma2, implementations=("eager", "flex_attention"), windows=(WINDOW, None)
    ),
    "gemma3": Family(build=gemma3, windows=(WINDOW, None)),
    "olmo2": Family(build=olmo2),
    "phi": Family(build=phi),
    "mixtral": Family(build=mixtral),
    "qwen3_moe": Family(build=qwen3_moe),
    "deepseek_v3": Family(build=deepseek_v3),
    "bloom": Family(build=bloom, implementations=("eager",)),
    "mpt": Family(build=mpt, implementations=("eager",)),
    "falcon": Family(build=falcon),
    "gptj": Family(build=gptj, implementations=("eager",)),
    "gpt_neo": Family(build=gpt_neo, implementations=("eager",), windows=(None, WINDOW)),
}

# The three layouts of weights that differ most, for tests that need no more.
HUGGING_FACE = {"gpt2": gpt2, "llama": llama, "gpt_neox": gpt_neox}
