"""Token ids in whatever a data loader yields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

# The name by which language model batches that are mappings call their token ids.
_TOKEN_IDS = "input_ids"  # noqa: S105 -- not a secret


def tokens_in(batch: Any) -> Tensor | None:
    """The token ids [sequence, position] in a batch, or None: the first integer matrix in it.

    In a mapping that is `input_ids`, without the rows that `attention_mask` shows to be padded.
    """
    if isinstance(batch, Tensor):
        whole = not batch.is_floating_point() and batch.dtype != torch.bool
        return batch if whole and batch.ndim == 2 else None
    if isinstance(batch, Mapping):
        if _TOKEN_IDS in batch:
            ids = tokens_in(batch[_TOKEN_IDS])
            mask = batch.get("attention_mask")
            if ids is not None and isinstance(mask, Tensor) and mask.shape == ids.shape:
                return ids[mask.bool().all(-1)]
            return ids
        batch = list(batch.values())
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return next((ids for part in batch if (ids := tokens_in(part)) is not None), None)
    return None


def count_tokens(batch: Any) -> int | Tensor | None:
    """How many token ids a batch holds, padding left out where a mask shows it; None: unknown.

    The count of a mask is left where the mask is, as a tensor: nothing waits for it yet.
    """
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        return mask.sum()
    tokens = tokens_in(batch)
    return None if tokens is None else tokens.numel()


class TokenCount:
    """The tokens that a model was trained on, in all processes; unknown once a batch is.

    Args:
        start: how many there were before; None: unknown.
        processes: how many see batches such as this one's.
    """

    def __init__(self, start: int | None, *, processes: int = 1) -> None:
        self._total: int | Tensor | None = start
        self._processes = processes
        self._latest: int | Tensor | None = 0

    def add(self, batch: Any) -> None:
        """Counts a batch that is about to be trained on."""
        self._total = self._sum()
        self._latest = count_tokens(batch)

    def take_back(self) -> None:
        """Leaves the latest batch out again: training broke off in it."""
        self._latest = 0

    @property
    def value(self) -> int | None:
        """Their number, where it is known."""
        total = self._sum()
        return None if total is None else int(total)

    def _sum(self) -> int | Tensor | None:
        if self._total is None or self._latest is None:
            return None
        return self._total + self._latest * self._processes


def tokens_of_loader(loader: Any, *, sequences: int) -> Tensor | None:
    """At most `sequences` examples spread over a loader's data set, or None.

    Examples are taken from the data set by index and not by iterating, so that no sampler moves
    and nobody's stream loses a batch; a data set that can only be iterated gives None.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    dataset: Any = loader.dataset
    size = len(dataset)
    chosen = torch.linspace(0, size - 1, min(sequences, size)).round().long().tolist()
    if not chosen:
        return None
    examples = [dataset[index] for index in chosen]
    tokens = tokens_in(loader.collate_fn(examples))
    return None if tokens is None or len(tokens) == 0 else tokens
