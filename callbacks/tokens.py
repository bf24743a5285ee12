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


def count_tokens(batch: Any) -> int | None:
    """How many token ids a batch holds, padding left out where a mask shows it; None: unknown."""
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    tokens = tokens_in(batch)
    return None if tokens is None else tokens.numel()


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
