"""Seeing a model's activations by their names, as they pass.

Shapes: `batch` sequences of `position` token ids; `feature` of the residual stream, `neuron` of an
MLP, `head` query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from monitor.parts.blocks import Parts
from monitor.parts.flow import Map, Tap, rows, run

Site = Literal[
    "residual_before",
    "attention_input",
    "query",
    "key",
    "value",
    "pattern",
    "mixed",
    "attention_write",
    "residual_middle",
    "mlp_input",
    "mlp_pre",
    "mlp_post",
    "mlp_write",
    "residual_after",
    "embedding_norm_input",
    "unembedding_input",
    "unembedding_output",
]
SITES: tuple[Site, ...] = get_args(Site)

_PER_HEAD = ("query", "key", "value", "pattern", "mixed")


class _SeenEnough(Exception):  # noqa: N818 -- it is no error
    """Ends a pass of which everything wanted was seen."""


See = Callable[[Site, int, Float[Tensor, "batch ..."]], Float[Tensor, "batch ..."] | None]


def watch(
    parts: Parts,
    tokens: Int[Tensor, "batch position"],
    see: See,
    *,
    sites: Collection[Site] = SITES,
    layers: Collection[int] | None = None,
) -> None:
    """Runs the model on `tokens` and calls `see(site, layer, tensor)` for what passes the `sites`
    of the `layers` (None: all), in passing order; sites of no block have layer -1. The pass ends
    when everything was seen. Nothing is kept here: what `see` wants to keep it must clone. A tensor
    that `see` returns takes the place of the one that it was shown, and the model goes on with it.

    Tensors are [batch position feature] or [batch position neuron], for queries, keys, values and
    mixed values [batch head position feature]: as attention gets them, so that keys and values
    may have fewer heads; patterns are [batch head query key], and seen only where queries, keys and
    values cannot be exchanged, since no one function makes attention of them. What is written is
    what is added to the stream, but for a scale (that of `Write`). A site that a block lacks is not
    seen: its `reasons` say why.

    Raises `ValueError` for a site or a layer that does not exist.
    """
    if unknown := set(sites) - set(SITES):
        raise ValueError(f"sites={sorted(unknown)}: expected some of {', '.join(SITES)}")
    if layers is not None and (absent := set(layers) - set(range(-1, len(parts.blocks)))):
        raise ValueError(
            f"layers={sorted(absent)}: expected layers of a model with {len(parts.blocks)} blocks, "
            "or -1 for what is in none"
        )
    wanted = _wanted(parts, sites, layers)
    left = set(wanted)

    def show(tap: Tap, tensor: Tensor, _linear: Map | None) -> Tensor | None:
        shown = tensor
        for site, layer in wanted.get(tap, ()):
            if (passes := _Passing.of(parts, tokens, site, layer, tap, shown)) is not None:
                exchanged = see(site, layer, passes.named)
                shown = shown if exchanged is None else passes.back(exchanged)
        left.discard(tap)
        if not left:
            raise _SeenEnough
        return None if shown is tensor else shown

    if wanted:
        with suppress(_SeenEnough):
            run(parts.model, tokens.to(parts.model.device), show)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Passing:
    """A tensor as it passes, and `named`, the form of it that a site promises: some `columns` of
    its rows, or all.
    """

    tensor: Tensor
    named: Tensor
    transposed: bool
    columns: Tensor | None

    @classmethod
    def of(  # noqa: PLR0917 -- where it passes
        cls, parts: Parts, tokens: Tensor, site: Site, layer: int, tap: Tap, tensor: Tensor
    ) -> _Passing | None:
        transposed, columns = tap in parts.position_first, None
        if site in _PER_HEAD:
            return cls(tensor=tensor, named=tensor, transposed=False, columns=None)
        if (named := rows(tensor, tokens, transposed=transposed)) is None:
            return None
        if site == "mlp_pre":
            columns = _pre_columns(parts, layer).to(named.device)
            named = named[..., columns]
        return cls(tensor=tensor, named=named, transposed=transposed, columns=columns)

    def back(self, exchanged: Tensor) -> Tensor:
        """What takes the tensor's place, in its layout."""
        if exchanged.shape != self.named.shape:
            raise ValueError(
                f"what takes a tensor's place has shape {list(exchanged.shape)}; expected "
                f"{list(self.named.shape)}, that of what passed"
            )
        own = self.tensor.transpose(0, 1) if self.transposed else self.tensor
        if self.columns is not None:
            whole = own.reshape(*exchanged.shape[:2], -1).clone()
            whole[..., self.columns] = exchanged
            exchanged = whole
        if own.ndim == 4 and own.shape[:2] != exchanged.shape[:2]:
            # Heads before positions.
            exchanged = exchanged.unflatten(2, (own.shape[1], -1)).transpose(1, 2)
        exchanged = exchanged.reshape(own.shape)
        return exchanged.transpose(0, 1) if self.transposed else exchanged


def activations(
    parts: Parts,
    tokens: Int[Tensor, "batch position"],
    *,
    sites: Collection[Site] = SITES,
    layers: Collection[int] | None = None,
) -> dict[tuple[Site, int], Float[Tensor, "batch ..."]]:
    """What `watch` sees, all of it at once: for small batches, few sites or few layers."""
    kept: dict[tuple[Site, int], Tensor] = {}

    def keep(site: Site, layer: int, tensor: Tensor) -> None:
        kept[site, layer] = tensor.clone()

    watch(parts, tokens, keep, sites=sites, layers=layers)
    return kept


def _wanted(
    parts: Parts, sites: Collection[Site], layers: Collection[int] | None
) -> dict[Tap, list[tuple[Site, int]]]:
    """Which sites are where."""
    wanted: dict[Tap, list[tuple[Site, int]]] = {}
    owners: list[tuple[int, Mapping[str, Tap]]] = [
        *((block.layer, block.taps) for block in parts.blocks),
        (-1, parts.taps),
    ]
    for layer, taps in owners:
        for site in SITES:
            if site in taps and site in sites and (layers is None or layer in layers):
                wanted.setdefault(taps[site], []).append((site, layer))
    return wanted


def _pre_columns(parts: Parts, layer: int) -> Int[Tensor, " neuron"]:
    neurons = parts.blocks[layer].neurons
    columns = None if neurons is None else neurons.pre_columns
    if columns is None:
        raise AssertionError("a block with pre-activations has neurons")
    return columns
