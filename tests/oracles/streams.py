"""What components write to a logit, and what the logit lens says, slowly and in float64.

Nothing here knows of parts: where the pieces of each family of models are is written down by hand,
and what they do is computed by loops from what hooks saw them read and make.

Shapes: lists by layer of [batch position feature].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the pieces of a family are; `{}` stands for the number of a block. `one_plus`: the
    gain of its norms is 1 + weight.
    """

    block: str
    output: str
    mlp: str
    final_norm: str
    attention_norm: str | None = None
    one_plus: bool = False


_UNEMBEDDING = "lm_head"

LLAMA = Anatomy(
    block="model.layers.{}",
    output="model.layers.{}.self_attn.o_proj",
    mlp="model.layers.{}.mlp",
    final_norm="model.norm",
)
NORMED = Anatomy(
    block="model.layers.{}",
    output="model.layers.{}.self_attn.o_proj",
    attention_norm="model.layers.{}.post_attention_layernorm",
    mlp="model.layers.{}.post_feedforward_layernorm",
    final_norm="model.norm",
)
ANATOMIES = {
    "gpt2": Anatomy(
        block="transformer.h.{}",
        output="transformer.h.{}.attn.c_proj",
        mlp="transformer.h.{}.mlp",
        final_norm="transformer.ln_f",
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "olmo2": NORMED,
    "gemma2": Anatomy(**{**vars(NORMED), "one_plus": True}),
    "gpt_neox": Anatomy(
        block="gpt_neox.layers.{}",
        output="gpt_neox.layers.{}.attention.dense",
        mlp="gpt_neox.layers.{}.mlp",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "bloom": Anatomy(
        block="transformer.h.{}",
        output="transformer.h.{}.self_attention.dense",
        mlp="transformer.h.{}.mlp.dense_4h_to_h",
        final_norm="transformer.ln_f",
    ),
    "phi": Anatomy(
        block="model.layers.{}",
        output="model.layers.{}.self_attn.dense",
        mlp="model.layers.{}.mlp",
        final_norm="model.final_layernorm",
    ),
}


class Pass:
    """A float64 copy of a model after one pass: what its modules read and made."""

    def __init__(self, module: nn.Module, tokens: Tensor) -> None:
        self.module = copy.deepcopy(module).double().eval()
        self.read: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        hooks = [
            inner.register_forward_hook(self._keeping(name), with_kwargs=True)
            for name, inner in self.module.named_modules()
        ]
        with torch.no_grad():
            self.module(tokens)
        for hook in hooks:
            hook.remove()

    def _keeping(self, name: str):
        def keep(_module, args, kwargs, output):
            given = [*args, *kwargs.values()]
            if given and isinstance(given[0], Tensor):
                self.read[name] = given[0].clone()
            made = output[0] if isinstance(output, tuple) else output
            if isinstance(made, Tensor):
                self.made[name] = made.clone()

        return keep

    def at(self, name: str) -> nn.Module:
        return self.module.get_submodule(name)


def written(seen: Pass, family: Anatomy, layers: int, heads: int) -> dict[tuple, Tensor]:
    """What every component writes to the stream, by its kind, layer and head."""
    found = {("embedding", -1, -1): seen.read[family.block.format(0)]}
    for layer in range(layers):
        path = family.output.format(layer)
        mixed, output = seen.read[path], seen.at(path)
        norm = family.attention_norm and family.attention_norm.format(layer)

        def through(piece: Tensor, *, constant: bool, norm=norm, path=path) -> Tensor:
            if norm is None:
                return piece
            return normed(seen, family, norm, seen.made[path], piece, constant=constant)

        with torch.no_grad():
            constant = output(torch.zeros_like(mixed))
            found["attention_bias", layer, -1] = through(constant, constant=True)
            for head, columns in enumerate(torch.arange(mixed.shape[-1]).chunk(heads)):
                alone = torch.zeros_like(mixed)
                alone[..., columns] = mixed[..., columns]
                found["head", layer, head] = through(output(alone) - constant, constant=False)
        found["mlp", layer, -1] = seen.made[family.mlp.format(layer)]
    return found


def normed(
    seen: Pass, family: Anatomy, path: str, whole: Tensor, piece: Tensor, *, constant: bool
) -> Tensor:
    """What a norm makes of a piece of what it read, divided by what it divided the whole by; with
    its `constant` bias or without.
    """
    module = seen.at(path)
    gain = module.weight.detach()
    if isinstance(module, nn.LayerNorm):
        scale = (whole.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        bias = module.bias.detach() if constant else 0.0
        return gain * (piece - piece.mean(-1, keepdim=True)) / scale + bias
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    scale = (whole.square().mean(-1, keepdim=True) + eps).sqrt()
    return (1 + gain if family.one_plus else gain) * piece / scale


def attribution(
    module: nn.Module, family: Anatomy, tokens: Tensor, targets: Tensor, layers: int, heads: int
) -> dict[tuple, list[tuple[float, float]]]:
    """Each component's mean contribution to the logits of the next token and of `targets[b, i]`
    after a token that has occurred before, by sequence; how they are named is as in `written`.
    """
    seen = Pass(module, tokens)
    stream = seen.made[family.block.format(layers - 1)]
    pieces = {
        name: normed(seen, family, family.final_norm, stream, piece, constant=False)
        for name, piece in written(seen, family, layers, heads).items()
    }
    zero = torch.zeros_like(stream)
    pieces["bias", -1, -1] = normed(seen, family, family.final_norm, stream, zero, constant=True)
    unembedding = seen.at(_UNEMBEDDING)
    bias = 0.0 if unembedding.bias is None else unembedding.bias.detach()
    means: dict[tuple, list[tuple[float, float]]] = {}
    for name, piece in pieces.items():
        logits = piece @ unembedding.weight.detach().T + (bias if name[0] == "bias" else 0.0)
        means[name] = _means(logits, tokens, targets)
    logits = seen.made[_UNEMBEDDING]
    means["logit", -1, -1] = _means(logits, tokens, targets)
    return means


def _means(logits: Tensor, tokens: Tensor, targets: Tensor) -> list[tuple[float, float]]:
    means = []
    for row, ids in enumerate(tokens.tolist()):
        correct, shuffled = [], []
        for query in range(len(ids) - 1):
            if ids[query] in ids[:query]:
                correct.append(float(logits[row, query, ids[query + 1]]))
                shuffled.append(float(logits[row, query, targets[row, query]]))
        means.append((sum(correct) / len(correct), sum(shuffled) / len(shuffled)))
    return means


@dataclass(frozen=True, kw_only=True)
class Lens:
    """Means over the predictions of one sequence at one layer."""

    loss: float
    agreement: float
    kl: float
    loss_null: float
    agreement_null: float
    kl_null: float


def lens(
    module: nn.Module, family: Anatomy, tokens: Tensor, positions: Sequence[int], layers: int
) -> list[list[Lens]]:
    """The lens after every block, by layer and sequence; first what it says of the embedding."""
    seen = Pass(module, tokens)
    streams = [seen.read[family.block.format(0)]]
    streams += [seen.made[family.block.format(layer)] for layer in range(layers)]
    cap = getattr(seen.module.config, "final_logit_softcapping", None)
    predicted = []
    with torch.no_grad():
        for stream in streams:
            logits = seen.at(_UNEMBEDDING)(seen.at(family.final_norm)(stream))
            predicted.append((logits if not cap else cap * (logits / cap).tanh()).softmax(-1))
    return [
        [_lens(rows[b], predicted[-1][b], tokens[b].tolist(), positions) for b in range(len(rows))]
        for rows in predicted
    ]


def _lens(layer: Tensor, final: Tensor, tokens: list[int], positions: Sequence[int]) -> Lens:
    def compared(own: int, other: int) -> tuple[float, float, float]:
        p, q = final[other].tolist(), layer[own].tolist()
        return (
            -math.log(q[tokens[other + 1]]),
            float(p.index(max(p)) == q.index(max(q))),
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        )

    here = [compared(own, own) for own in positions]
    elsewhere = [compared(a, b) for a in positions for b in positions if a != b]
    means = [sum(values) / len(values) for values in (*zip(*here, strict=True),)]
    nulls = [sum(values) / len(values) for values in (*zip(*elsewhere, strict=True),)]
    return Lens(
        loss=means[0],
        agreement=means[1],
        kl=means[2],
        loss_null=nulls[0],
        agreement_null=nulls[1],
        kl_null=nulls[2],
    )
