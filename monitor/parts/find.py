"""Finding the parts of a model by what flows through it in one short pass.

Nothing here knows an architecture. A matrix is a head's because its output holds the head's values,
column by column; an MLP's last matrix is known by what it adds to the residual stream; a norm by
what it reads and who reads it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monitor.anatomy import LanguageModel
from monitor.parts.blocks import Block, Parts
from monitor.parts.flow import Tap
from monitor.parts.in_block import find_block
from monitor.parts.linears import as_linear
from monitor.parts.recording import NotFoundError, Recording, same
from monitor.parts.verify import verified
from monitor.parts.weights import Matrix

_SEED = 0


def find_parts(model: LanguageModel) -> Parts:
    """The parts of `model`, each checked against the model's own pass on other tokens.

    What is not found or fails its check is None, and `reasons` says why.
    """
    recording = Recording.of(model, seed=_SEED)
    reasons: dict[str, str] = {}
    blocks: tuple[Block, ...] = ()
    try:
        paths = _block_paths(recording)
        blocks = tuple(find_block(model, recording.within(p), i, p) for i, p in enumerate(paths))
        _check_stream(recording, blocks)
    except NotFoundError as missing:
        reasons["blocks"] = str(missing)
        blocks = ()
    found: dict[str, Any] = {}
    taps: dict[str, Tap] = {}
    first, last = None, None
    if blocks:
        first = recording.at[blocks[0].taps["residual_before"]].rows
        last = recording.at[blocks[-1].taps["residual_after"]].rows
    searches: dict[str, Callable[[], dict[str, Any]]] = {
        "embedding": lambda: _embedding(model, recording, first, taps),
        "unembedding": lambda: _unembedding(model, recording, taps),
        "final_norm": lambda: _final_norm(recording, last, taps),
    }
    for name, search in searches.items():
        try:
            found |= search()
        except NotFoundError as missing:
            reasons[name] = str(missing)
    transposed = frozenset(seen.tap for seen in recording.seen if seen.transposed)
    return verified(
        Parts(
            model=model,
            blocks=blocks,
            taps=taps,
            position_first=transposed,
            reasons=reasons,
            **found,
        )
    )


def _block_paths(recording: Recording) -> list[str]:
    """The paths of the modules in one list of modules whose members attend, in running order."""
    attending = [seen.tap.path for seen in recording.of_kind("mixed")]
    if not attending:
        raise NotFoundError("no attention was seen over all positions")
    for depth in range(1, 1 + max(path.count(".") + 1 for path in attending)):
        # Everything up to the last of so many indices.
        prefix = re.compile(rf"(?:(?:[^.]*[^.\d][^.]*\.)*\d+(?:\.|$)){{{depth}}}")
        matches = [prefix.match(path) for path in attending]
        paths = [match.group().removesuffix(".") for match in matches if match]
        parents = {path.rpartition(".")[0] for path in paths}
        if len(set(paths)) == len(attending) and len(parents) == 1:
            break
    else:
        raise NotFoundError(
            "the attending modules are not one in each member of a list of modules: "
            + ", ".join(path or "the model itself" for path in attending)
        )
    (parent,) = parents
    sibling = re.compile(rf"{re.escape(f'{parent}.' if parent else '')}\d+")
    ran = [seen.tap for seen in recording.of_kind("input") if sibling.fullmatch(seen.tap.path)]
    if any(tap.number for tap in ran):
        raise NotFoundError("a block runs more than once in a pass")
    return [tap.path for tap in ran]


def _check_stream(recording: Recording, blocks: tuple[Block, ...]) -> None:
    for one, following in itertools.pairwise(blocks):
        if "residual" in one.reasons or "residual" in following.reasons:
            raise NotFoundError(f"{one.path}: a block that does not read and return a stream")
        after = recording.at[one.taps["residual_after"]].rows
        if not same(after, recording.at[following.taps["residual_before"]].rows):
            raise NotFoundError(f"{following.path} does not read what {one.path} returns")
    if blocks and "residual" in blocks[0].reasons:
        raise NotFoundError(f"{blocks[0].path}: {blocks[0].reasons['residual']}")


def _embedding(
    model: LanguageModel, recording: Recording, stream: Tensor | None, taps: dict[str, Tap]
) -> dict[str, Any]:
    looked_up = recording.of_kind("embedding")
    if len(looked_up) != 1:
        raise NotFoundError(f"{len(looked_up)} embeddings were asked for the token ids, not one")
    (seen,) = looked_up
    matrix = None if seen.linear is None else Matrix.of(model.module, seen.linear)
    if matrix is None:
        raise NotFoundError("the embedding is computed on the way, and no parameter")
    found: dict[str, Any] = {"embedding_map": matrix}
    if stream is None:
        return found
    if (scale := _times(stream, seen.rows)) is not None:
        return found | {"embedding_scale": scale}
    for given, made in recording.modules():
        if same(made.rows, stream) and (scale := _times(given.rows, seen.rows)) is not None:
            taps["embedding_norm_input"] = given.tap
            return found | {"embedding_scale": scale, "embedding_norm": made.tap.path}
    raise NotFoundError(
        "the residual stream does not begin with the token's embedding and what depends on its "
        "position alone"
    )


def _times(stream: Tensor, embedded: Tensor) -> float | None:
    """By what the embedding is multiplied in the stream, but for what depends on position alone."""
    if stream.shape != embedded.shape:
        return None
    # The same at every position in all sequences, so gone from their differences.
    wanted, given = (t.double() - t.double().mean(0) for t in (stream, embedded))
    scale = float((wanted * given).sum() / (given * given).sum().clamp(min=1e-300))
    scale = 1.0 if abs(scale - 1) < 1e-4 else scale
    rounding = torch.finfo(stream.dtype).eps * float(stream.abs().max())
    return scale if float((wanted - scale * given).abs().max()) <= 16 * rounding else None


def _unembedding(
    model: LanguageModel, recording: Recording, taps: dict[str, Tap]
) -> dict[str, Any]:
    width = recording.logits.shape[-1]
    made = [seen for seen in recording.of_kind("linear output") if seen.rows.shape[-1] == width]
    if not made:
        raise NotFoundError(f"no linear map gives {width} numbers, as many as there are logits")
    given = recording.before(made[-1])
    maps = [output for read, output in recording.linears() if same(read.rows, given.rows)]
    for output in maps:
        capped = _cap(output.rows, recording.logits)
        if capped is not None and output.tap.path:
            taps["unembedding_input"], taps["unembedding_output"] = given.tap, output.tap
            return {"unembedding_map": as_linear(model, given, output), **capped}
    raise NotFoundError(
        f"the logits are not what {made[-1].tap.path} gives, nor that scaled or capped by a tanh"
    )


def _cap(given: Tensor, logits: Tensor) -> dict[str, float] | None:
    """The scale and the cap that make logits of `given`."""
    if given.shape != logits.shape:
        return None
    if same(given, logits):
        return {}
    wanted, values = logits.double().flatten(), given.double().flatten()
    tolerance = 64 * torch.finfo(logits.dtype).eps
    scale = float((wanted * values).sum() / (values * values).sum())
    if float((wanted - scale * values).abs().max()) <= tolerance * float(wanted.abs().max()):
        return {"logit_scale": scale}
    # c · tanh(x / c) rises with c: bisected at the largest logit, checked at all.
    largest = int(wanted.abs().argmax())
    target, value = abs(float(wanted[largest])), abs(float(values[largest]))
    low, high = target, 1e6 * max(target, 1e-6)
    for _ in range(200):
        cap = (low + high) / 2
        low, high = (cap, high) if cap * math.tanh(value / cap) < target else (low, cap)
    # A cap is a number that somebody chose, and at a saturated logit rounding blurs it.
    for cap in (float(f"{high:.3g}"), high):
        if float((wanted - cap * (values / cap).tanh()).abs().max()) <= tolerance * target:
            return {"logit_cap": cap}
    return None


def _final_norm(
    recording: Recording, stream: Tensor | None, taps: dict[str, Tap]
) -> dict[str, Any]:
    if stream is None or "unembedding_input" not in taps:
        raise NotFoundError(
            "it is between the last block and the unembedding, which were not found"
        )
    read = recording.at[taps["unembedding_input"]]
    if same(read.rows, stream):
        return {}
    if (path := recording.reader_of(stream, read)) is None:
        raise NotFoundError("the unembedding reads no module's output that the last block feeds")
    return {"final_norm": path}
