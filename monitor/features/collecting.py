"""One pass over labelled tokens, in which collectors add up what they need of activations.

A pass goes through the sequences in the order of what they are for: what a collector fits on the
first it can use on the next, and nothing is kept but sums. So the memory that this takes does not
grow with the number of tokens.

Shapes: `token` those of some sequences that are no padding; `concept` what they are labelled with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from monitor.labels import EVALUATION, FIRST_HALF, SECOND_HALF
from monitor.parts import Parts, Site, watch
from monitor.stimuli import Stimulus
from monitor.streams import UnseenError
from monitor.untouched import exact

# Why there is nothing to tell of labels.
NO_CONCEPTS = "no concepts were given: pass concepts="

# So many tokens go through the model at a time, or one sequence.
_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some of the tokens of a stimulus, all in sequences for the same `split`, and where they are:
    `row` in which sequence, `position` in that; `ids` are the tokens themselves.
    """

    split: int
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    ids: Int[Tensor, " token"]

    def of(self, values: Int8[Tensor, "task batch position"]) -> Int8[Tensor, "task token"]:
        """The entries of these tokens in labels of the whole stimulus."""
        return values[:, self.row.to(values.device), self.position.to(values.device)]


@runtime_checkable
class Collector(Protocol):
    """Adds up something of the activations at some `sites` of all blocks."""

    sites: Collection[Site]

    def see(
        self, site: Site, layer: int, rows: Float[Tensor, "token feature"], chunk: Chunk
    ) -> None:
        """Takes the activations of some tokens, as they are: what is kept must be copied."""
        ...

    def turn(self, split: int) -> None:
        """All sequences that are for `split` were seen."""
        ...

    def collected(self) -> Any:
        """What was collected, on the CPU, once all was seen."""
        ...


def collect(
    parts: Parts,
    stimulus: Stimulus,
    kinds: Mapping[str, Callable[[Parts, Stimulus], Collector]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """What each kind of collector made of a labelled stimulus, and of those that could not the
    reason. An error in one is no other's.

    Raises `ValueError` where the stimulus has no labels, and what the model raises.
    """
    labels = stimulus.labels
    if labels is None:
        raise ValueError(f"stimulus {stimulus.name!r}: expected one with labels")
    if not parts.blocks:
        return {}, dict.fromkeys(kinds, f"blocks: {parts.reasons.get('blocks', 'not found')}")
    reasons: dict[str, str] = {}
    collectors: dict[str, Collector] = {}
    for kind, make in kinds.items():
        with _given_up(kind, reasons):
            collectors[kind] = make(parts, stimulus)
    at_once = max(1, _TOKENS // stimulus.tokens.shape[1])
    for split in (FIRST_HALF, SECOND_HALF, EVALUATION):
        for rows in (labels.split == split).nonzero().flatten().split(at_once):
            local, position = labels.used[rows].nonzero(as_tuple=True)
            tokens = stimulus.tokens[rows]
            chunk = Chunk(
                split=split, row=rows[local], position=position, ids=tokens[local, position]
            )
            _pass(parts, tokens, (local, position), chunk, collectors, reasons)
        for kind in collectors.keys() - reasons:
            with _given_up(kind, reasons), exact(parts.model.device.type), torch.no_grad():
                collectors[kind].turn(split)
    collected: dict[str, Any] = {}
    for kind in collectors.keys() - reasons:
        with _given_up(kind, reasons):
            collected[kind] = collectors[kind].collected()
    return collected, reasons


def _pass(  # noqa: PLR0917 -- all that a pass is about
    parts: Parts,
    tokens: Int[Tensor, "batch position"],
    used: tuple[Int[Tensor, " token"], Int[Tensor, " token"]],
    chunk: Chunk,
    collectors: Mapping[str, Collector],
    reasons: dict[str, str],
) -> None:
    row, position = (place.to(parts.model.device) for place in used)

    def see(site: Site, layer: int, tensor: Tensor) -> None:
        wanting = [
            kind for kind, its in collectors.items() if kind not in reasons and site in its.sites
        ]
        # What is added up here is no part of the model, and nobody who follows its functions
        # should take it for one.
        with torch._C.DisableTorchFunction():
            rows = tensor[row, position]
            for kind in wanting:
                with _given_up(kind, reasons):
                    collectors[kind].see(site, layer, rows, chunk)

    sites = {site for kind, its in collectors.items() if kind not in reasons for site in its.sites}
    if sites and len(row):
        watch(parts, tokens, see, sites=sites)


@contextmanager
def _given_up(kind: str, reasons: dict[str, str]) -> Iterator[None]:
    """Keeps what is raised inside as the reason why there is nothing of this kind."""
    try:
        yield
    except UnseenError as error:
        reasons[kind] = str(error)
    except Exception as error:
        reasons[kind] = f"{type(error).__name__}: {error}"
