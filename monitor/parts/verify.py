"""Checking the parts of a model against its own forward pass.

Every part is used as a probe would use it, on tokens of the check's own, to compute what the model
computed: queries, keys and values from what attention reads, what attention writes from mixed
values, what the MLP writes from its post-activations, the stream from what is written, logits from
the final norm's output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from monitor.parts.blocks import Block, Mixing, Neurons, Parts, Projection, Write, bias_of
from monitor.parts.neurons import gated_roughness
from monitor.parts.recording import error, some_tokens
from monitor.parts.watching import Site, watch
from monitor.untouched import untouched

_SEED = 1

# The sites that are no longer what they are called where a part is not what it was taken for.
_SITES_OF = {
    "neurons": ("mlp_pre", "mlp_post"),
    "attention_write": ("attention_write",),
    "mlp_write": ("mlp_write",),
    "attention_norm": ("attention_input",),
    "mlp_norm": ("mlp_input",),
}


def verify(parts: Parts) -> dict[str, str]:
    """What of `parts` does not agree with the model as it is now, and how far off it is: by the
    name of the part (`embedding`, `blocks.0.query`). Empty where all agree.
    """
    tokens = some_tokens(parts.model, seed=_SEED)
    seen: dict[int, dict[Site, Tensor]] = {}

    def keep(site: Site, layer: int, tensor: Tensor) -> None:
        seen.setdefault(layer, {})[site] = tensor.clone()

    watch(parts, tokens, keep)
    wrong: dict[str, str] = {}
    for block in parts.blocks:
        of_block = _Rebuilt(parts, block, seen.get(block.layer, {}))
        for name, check in of_block.checks().items():
            _check(wrong, f"blocks.{block.layer}.{name}", check)
    for name, check in _end_checks(parts, tokens, seen).items():
        _check(wrong, name, check)
    return wrong


def verified(parts: Parts) -> Parts:
    """The same without what does not agree with the model, for which there are reasons then."""
    wrong = verify(parts)
    blocks = []
    for block in parts.blocks:
        prefix = f"blocks.{block.layer}."
        own = {k.removeprefix(prefix): v for k, v in wrong.items() if k.startswith(prefix)}
        nothing: dict[str, Any] = dict.fromkeys(own)
        gone = {site for name in own for site in _SITES_OF.get(name, ())}
        blocks.append(
            dataclasses.replace(
                block,
                taps={site: tap for site, tap in block.taps.items() if site not in gone},
                reasons={**block.reasons, **own},
                **nothing,
            )
        )
    ends = {name: why for name, why in wrong.items() if "." not in name}
    fields: dict[str, Any] = {
        f"{name}_map" if name != "final_norm" else name: None for name in ends
    }
    return dataclasses.replace(
        parts, blocks=tuple(blocks), reasons={**parts.reasons, **ends}, **fields
    )


# Gives what was rebuilt, what the model computed, and how large the numbers were that it is from.
_Check = Callable[[], tuple[Tensor, Tensor, float]]


def _check(wrong: dict[str, str], name: str, check: _Check) -> None:
    try:
        rebuilt, own, largest = check()
    except Exception as error:
        wrong[name] = f"it could not be checked: {type(error).__name__}: {error}"
        return
    if rebuilt.shape != own.shape:
        wrong[name] = f"rebuilt it is {list(rebuilt.shape)}, in the model {list(own.shape)}"
        return
    size, eps = float(own.abs().max()), torch.finfo(own.dtype).eps
    # Sums of many terms, in another order than the model's: far below what a wrong part gives.
    allowed = size * eps**0.5 + 16 * largest * eps
    apart = float((rebuilt.double() - own.double()).abs().max())
    if not apart <= allowed:
        wrong[name] = (
            f"what the model computes, rebuilt from it, is off by {apart:.2g} of {size:.2g}"
        )


class _Rebuilt:
    """What a model computes, from its parts and what these read."""

    def __init__(self, parts: Parts, block: Block, seen: Mapping[Site, Tensor]) -> None:
        self._parts = parts
        self._block = block
        self._seen = seen

    def checks(self) -> dict[str, _Check]:
        """The checks of all parts that were found."""
        block = self._block
        checks: dict[str, _Check] = {}
        for name in ("query", "key", "value"):
            if (projection := getattr(block, name)) is not None:
                checks[name] = functools.partial(self._projected, name, projection)
        if block.mixing is not None:
            checks["mixing"] = functools.partial(self._mixed, block.mixing)
        if block.neurons is not None:
            checks["neurons"] = functools.partial(self._neurons, block.neurons)
        if block.attention_write is not None:
            checks["attention_write"] = self._stream
        if block.mlp_write is not None:
            checks["mlp_write"] = self._stream
        if "attention_input" in self._seen:
            checks["attention_norm"] = self._attention_input
        if "mlp_input" in self._seen:
            checks["mlp_norm"] = self._mlp_input
        return checks

    def _projected(self, name: Site, projection: Projection) -> tuple[Tensor, Tensor, float]:
        own = rearrange(self._seen[name], "b h p d -> b p h d")
        every = self._block.heads or own.shape[2]
        weights, biases = projection.weights(every), projection.biases(every)
        heads = torch.einsum("bpf,hfd->bphd", self._seen["attention_input"], weights) + biases
        own = own.repeat_interleave(every // own.shape[2], dim=2)
        if name != "value":
            # A rotation by position leaves the first position as it is.
            own = own[:, :1]
        if projection.norm is not None and projection.norm_columns is not None:
            heads = self._normed(projection.norm, projection.norm_columns, heads, own)
        return projection.scale * heads[:, : own.shape[1]], own, 0.0

    def _normed(self, norm: str, columns: Tensor, heads: Tensor, own: Tensor) -> Tensor:
        """The norm is each head's own, or one over all of the projection: whichever fits."""
        each = heads.shape[2] // len(columns)
        apart, columns = heads[:, :, ::each], columns.to(heads.device)
        together = apart.new_zeros(*apart.shape[:2], int(columns.max()) + 1)
        together[..., columns.flatten()] = apart.flatten(2)
        results = []
        for given in (apart, together):
            try:
                made = self._module(norm, given)
            except RuntimeError:
                continue
            made = made[..., columns] if given is together else made
            results.append(made.repeat_interleave(each, dim=2))
        return min(results, key=lambda one: float((one[:, : own.shape[1]] - own).abs().max()))

    def _mixed(self, mixing: Mixing) -> tuple[Tensor, Tensor, float]:
        made = torch.einsum("bhpd,hdf->bpf", self._seen["mixed"], mixing.weights)
        written = self._written(made + bias_of(mixing.linear), self._block.attention_write)
        return written, self._seen["attention_write"], 0.0

    def _neurons(self, neurons: Neurons) -> tuple[Tensor, Tensor, float]:
        seen = self._seen
        source = neurons.up if neurons.gate is None else neurons.gate
        if source is not None and neurons.pre_columns is not None:
            weight, bias = source.read()
            made = F.linear(seen["mlp_input"], weight, bias)[..., neurons.pre_columns]
            if error(made, seen["mlp_pre"]) > torch.finfo(made.dtype).eps ** -0.5:
                return made, seen["mlp_pre"], 0.0
        if neurons.gate is not None and neurons.up is not None and neurons.up_columns is not None:
            gated = F.linear(seen["mlp_input"], *neurons.up.read())[..., neurons.up_columns]
            if gated_roughness(seen["mlp_pre"], gated, seen["mlp_post"]) > 1:
                raise ValueError("the post-activations are not a function of the gate, times w_in")
        made = F.linear(seen["mlp_post"], *neurons.out.read())
        return self._written(made, self._block.mlp_write), seen["mlp_write"], 0.0

    def _stream(self) -> tuple[Tensor, Tensor, float]:
        block, seen = self._block, self._seen
        after = seen["residual_after"]
        if block.stream_norms is None:
            change = torch.zeros_like(after)
            for write, site in self._writes():
                change = change + write.scale * seen[site]
            return change, after - seen["residual_before"], float(after.abs().max())
        stream = seen["residual_before"]
        for norm, (write, site) in zip(block.stream_norms, self._writes(), strict=True):
            stream = self._module(norm, stream + write.scale * seen[site])
        return stream, after, 0.0

    def _writes(self) -> list[tuple[Write, Site]]:
        block = self._block
        writes: list[tuple[Write | None, Site]] = [
            (block.attention_write, "attention_write"),
            (block.mlp_write, "mlp_write"),
        ]
        return [(write, site) for write, site in writes if write is not None]

    def _attention_input(self) -> tuple[Tensor, Tensor, float]:
        read = self._module(self._block.attention_norm, self._seen["residual_before"])
        return read, self._seen["attention_input"], 0.0

    def _mlp_input(self) -> tuple[Tensor, Tensor, float]:
        block, seen = self._block, self._seen
        stream = seen.get("residual_middle", seen["residual_before"])
        if not block.parallel and block.stream_norms is None and block.attention_write is not None:
            stream = stream + block.attention_write.scale * seen["attention_write"]
        return self._module(block.mlp_norm, stream), seen["mlp_input"], 0.0

    def _written(self, made: Tensor, write: Write | None) -> Tensor:
        return self._module(None if write is None else write.norm, made)

    def _module(self, path: str | None, given: Tensor) -> Tensor:
        return self._parts.apply(path, given)


def _end_checks(
    parts: Parts, tokens: Tensor, seen: Mapping[int, Mapping[Site, Tensor]]
) -> dict[str, _Check]:
    checks: dict[str, _Check] = {}
    ends = seen.get(-1, {})
    if parts.unembedding_map is not None:
        checks["unembedding"] = lambda: (
            parts.unembed(ends["unembedding_input"]),
            _own_logits(parts, tokens),
            0.0,
        )
    if not parts.blocks:
        return checks
    first = seen[0]["residual_before"]
    last = seen[len(parts.blocks) - 1]["residual_after"]
    if (embedding := parts.embedding_map) is not None:
        checks["embedding"] = lambda: _embedded(
            parts, parts.embedding_scale * embedding.read()[0][tokens], ends, first
        )
    if "unembedding_input" in ends and "final_norm" not in parts.reasons:
        checks["final_norm"] = lambda: (
            parts.apply(parts.final_norm, last),
            ends["unembedding_input"],
            0.0,
        )
    return checks


def _embedded(
    parts: Parts, embedded: Tensor, ends: Mapping[Site, Tensor], first: Tensor
) -> tuple[Tensor, Tensor, float]:
    stream = ends.get("embedding_norm_input", first)
    if parts.embedding_norm is not None:
        normed = parts.apply(parts.embedding_norm, stream)
        if error(normed, first) > torch.finfo(normed.dtype).eps ** -0.5:
            return normed, first, 0.0
    # What depends on the position alone is gone from the differences of sequences.
    given, own = (t - t.mean(0) for t in (embedded, stream))
    return given, own, float(stream.abs().max())


def _own_logits(parts: Parts, tokens: Tensor) -> Tensor:
    with untouched(parts.model.module):
        return parts.model.logits(tokens)
