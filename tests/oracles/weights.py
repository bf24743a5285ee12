"""Copying and composition as their formulas have them: whole matrices in float64, head by head.

The matrices are taken from the models by the names that their families give them, norms multiplied
into them as whole matrices. Nothing here knows of `monitor`.

Shapes: `token` of the vocabulary; `feature` of the stream; `head_feature` of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """What it makes of the stream: queries, keys and values [feature head_feature]; and what it
    writes [head_feature feature].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Whole:
    """Heads by layer, and both ends [token feature]."""

    layers: list[list[Head]]
    embedding: Tensor
    unembedding: Tensor


def norm_matrix(gain: Tensor, *, centred: bool) -> Tensor:
    """What a norm does to the direction of the rows that it reads."""
    size = len(gain)
    centring = torch.eye(size, dtype=torch.float64)
    if centred:
        centring -= torch.full((size, size), 1 / size, dtype=torch.float64)
    return centring @ torch.diag(gain.detach().double())


def of_gpt2(model: nn.Module) -> Whole:
    """LayerNorms; one matrix for queries, keys and values, transposed as no other has it."""
    heads, width = model.config.n_head, model.config.n_embd
    size, layers = width // heads, []
    for block in model.transformer.h:
        norm = norm_matrix(block.ln_1.weight, centred=True)
        every = norm @ block.attn.c_attn.weight.detach().double()
        output = block.attn.c_proj.weight.detach().double()
        layers.append([])
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            query, key, value = (every[:, k * width : (k + 1) * width][:, own] for k in range(3))
            layers[-1].append(Head(query=query, key=key, value=value, output=output[own]))
    final = norm_matrix(model.transformer.ln_f.weight, centred=True)
    return Whole(
        layers=layers,
        embedding=model.transformer.wte.weight.detach().double(),
        unembedding=model.lm_head.weight.detach().double() @ final.T,
    )


def of_llama(model: nn.Module) -> Whole:
    """RMSNorms; fewer keys and values than queries. Gemma 2 has 1 + w for gains, norms what is
    written too, and multiplies its embedding; Qwen 3 norms the queries and keys of each head.
    """
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    gemma = config.model_type == "gemma2"
    size = getattr(config, "head_dim", None) or config.hidden_size // heads

    def matrix(norm: nn.Module) -> Tensor:
        return norm_matrix(norm.weight + 1 if gemma else norm.weight, centred=False)

    def rows(linear: nn.Module, head: int) -> Tensor:
        return linear.weight.detach().double()[head * size : (head + 1) * size].T

    layers = []
    for block in model.model.layers:
        attention, norm = block.self_attn, matrix(block.input_layernorm)
        after = torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
        if config.model_type == "qwen3":
            after = matrix(attention.q_norm), matrix(attention.k_norm)
        written = torch.eye(config.hidden_size, dtype=torch.float64)
        if gemma:
            written = matrix(block.post_attention_layernorm)
        layers.append(
            [
                Head(
                    query=norm @ rows(attention.q_proj, head) @ after[0],
                    key=norm @ rows(attention.k_proj, head * groups // heads) @ after[1],
                    value=norm @ rows(attention.v_proj, head * groups // heads),
                    output=attention.o_proj.weight.detach()
                    .double()[:, head * size : (head + 1) * size]
                    .T
                    @ written,
                )
                for head in range(heads)
            ]
        )
    embedding = model.model.embed_tokens.weight.detach().double()
    return Whole(
        layers=layers,
        embedding=embedding * (config.hidden_size**0.5 if gemma else 1),
        unembedding=model.lm_head.weight.detach().double() @ matrix(model.model.norm).T,
    )


OF = {"gpt2": of_gpt2, "llama": of_llama, "gemma2": of_llama, "qwen3": of_llama}


def eigenvalue_score(whole: Whole, head: Head) -> float:
    """From all eigenvalues of the matrix from tokens to tokens."""
    unembedding = whole.unembedding - whole.unembedding.mean(0)
    circuit = whole.embedding @ head.value @ head.output @ unembedding.T
    eigenvalues = torch.linalg.eigvals(circuit)
    return float(eigenvalues.sum().real / eigenvalues.abs().sum())


def direct_shares(whole: Whole, head: Head) -> list[float]:
    """Of every token, among all tokens."""
    shares = []
    for token in range(len(whole.embedding)):
        logits = whole.embedding[token] @ head.value @ head.output @ whole.unembedding.T
        above = [max(float(logit - logits.mean()), 0.0) for logit in logits]
        shares.append(above[token] / sum(above))
    return shares


def composition(source: Head, target: Head, kind: str) -> float:
    """‖W_A W_B‖ / (‖W_A‖ ‖W_B‖)."""
    writes = source.value @ source.output
    reads = {
        "q": target.query @ target.key.T,
        "k": target.key @ target.query.T,
        "v": target.value @ target.output,
    }[kind]
    return float((writes @ reads).norm() / writes.norm() / reads.norm())


def random_compositions(features: int, size: int, draws: int, seed: int) -> Tensor:
    """Of heads of Gaussian matrices, every pair drawn anew."""
    random = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(features, size, dtype=torch.float64, generator=random)

    def head() -> Head:
        return Head(query=drawn(), key=drawn(), value=drawn(), output=drawn().T)

    return torch.tensor([composition(head(), head(), "k") for _ in range(draws)])
