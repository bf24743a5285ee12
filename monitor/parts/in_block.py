"""Finding the parts of one block by what flows through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from monitor.anatomy import LanguageModel
from monitor.parts.blocks import Block, Mixing, Projection, Write
from monitor.parts.flow import Tap
from monitor.parts.linears import as_linear
from monitor.parts.neurons import find_neurons
from monitor.parts.recording import (
    NotFoundError,
    Recording,
    Seen,
    close,
    matching_columns,
    same,
)

_Found = TypeVar("_Found")


def find_block(model: LanguageModel, recording: Recording, layer: int, path: str) -> Block:
    """The parts of the block at `path`, of which `recording` holds what flowed in it."""
    before, after = (recording.at.get(Tap(path, kind)) for kind in ("input", "output"))
    if before is None or after is None or before.rows.shape != after.rows.shape:
        why = "it does not read and return a residual stream"
        return Block(layer=layer, path=path, taps={}, reasons={"residual": why})
    search = _Search(model=model, recording=recording, path=path, before=before, after=after)
    search.attention()
    search.writes()
    search.mlp()
    return Block(layer=layer, path=path, taps=search.taps, reasons=search.reasons, **search.found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Written:
    """What may be what a block adds to its stream: `raw`, or what a `norm` makes of it."""

    raw: Seen
    added: Seen
    norm: str | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Search:
    model: LanguageModel
    recording: Recording
    path: str
    before: Seen
    after: Seen
    taps: dict[str, Tap] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    mixed: Seen | None = None
    attention_written: _Written | None = None
    mlp_written: _Written | None = None
    # What the MLP may read: the stream before the block, and after its attention.
    middle: Tensor | None = None

    def __post_init__(self) -> None:
        self.taps |= {"residual_before": self.before.tap, "residual_after": self.after.tap}

    def attempt(self, name: str, search: Callable[[], _Found]) -> _Found | None:
        """What `search` finds, also kept as what was found, or the reason why it found nothing."""
        try:
            self.found[name] = found = search()
        except NotFoundError as missing:
            self.reasons[name] = str(missing)
            return None
        return found

    def attention(self) -> None:
        """Queries, keys and values, and what they are made of."""
        calls = {k: self.recording.of_kind(k) for k in ("query", "key", "value", "mixed")}
        if any(len(seen) != 1 for seen in calls.values()):
            why = f"{len(calls['mixed'])} attention calls were seen in the block, not one"
            self.reasons |= dict.fromkeys(("query", "key", "value", "mixing"), why)
            return
        query, key, value, self.mixed = (seen[0] for seen in calls.values())
        self.taps |= {kind: seen[0].tap for kind, seen in calls.items()}
        for pattern in self.recording.of_kind("pattern"):
            self.taps["pattern"] = pattern.tap
        self.found["heads"] = query.heads
        self.attempt("value", lambda: self.projection(value, slice(None)))
        # A rotation by position leaves the first position as it is.
        self.attempt("query", lambda: self.projection(query, slice(1)))
        self.attempt("key", lambda: self.projection(key, slice(1)))
        for name in ("query", "key", "value"):
            if name not in self.found:
                continue
            read = self.recording.at[self.found[name].reads]
            if self.reads("attention", read, self.before.rows) is None:
                self.reasons[name] = (
                    f"{read.tap.path} reads neither the residual stream nor a norm of it"
                )
                self.reasons.setdefault("attention_norm", self.reasons[name])
                del self.found[name]
        if "attention_norm" in self.found:
            self.reasons.pop("attention_norm", None)

    def projection(self, target: Seen, positions: slice) -> Projection:
        """The linear map whose output, or what a norm makes of it, holds the target's columns."""
        wanted = target.rows[:, positions].flatten(0, 1)
        for given, output in self.recording.linears():
            columns = matching_columns(wanted, output.rows[:, positions].flatten(0, 1))
            if columns is not None:
                return self.projected(target, given, output, *columns)
        for given, normed in self.recording.modules():
            if given.rows.shape != normed.rows.shape or normed.tap.path == self.path:
                continue
            columns = matching_columns(wanted, normed.rows[:, positions].flatten(0, 1))
            if columns is None:
                continue
            unnormed = given.rows[..., columns[0]].flatten(0, 1)
            for read, output in self.recording.linears():
                inner = matching_columns(unnormed, output.rows.flatten(0, 1))
                if inner is not None and inner[1] == 1.0:
                    found = self.projected(target, read, output, inner[0], columns[1])
                    return found.normed(normed.tap.path, columns[0])
        raise NotFoundError(
            f"no linear map in the block, with or without a norm after it, gives the "
            f"{target.tap.kind} columns of {target.tap.path}"
        )

    def projected(
        self, target: Seen, given: Seen, output: Seen, columns: Tensor, scale: float
    ) -> Projection:
        """The projection by the linear map between two tensors."""
        return Projection(
            linear=as_linear(self.model, given, output),
            columns=columns.unflatten(0, (target.heads or 1, -1)),
            scale=scale,
            reads=given.tap,
            writes=output.tap,
        )

    def reads(self, who: str, read: Seen, *streams: Tensor) -> int | None:
        """Which of the streams attention or MLP reads; notes where, and through which norm."""
        for number, stream in enumerate(streams):
            path = None
            if close(read.rows, stream) or (path := self.recording.reader_of(stream, read)):
                self.taps[f"{who}_input"] = read.tap
                self.found[f"{who}_norm"] = path
                return number
        return None

    def writes(self) -> None:
        """What attention and MLP add to the stream, and how."""
        attention, others = self.attention_outputs(), self.other_outputs()
        if self.added(attention, others) or self.normed_stream(attention, others):
            return
        why = "the block does not return its stream with what attention and MLP add to it"
        self.reasons |= {"attention_write": why, "mlp_write": why}

    def attention_outputs(self) -> list[_Written]:
        """What attention may add: what a map makes of mixed values, or its whole module; and what
        other modules make of that.
        """
        if self.mixed is None:
            return []
        raw = []
        for given, output in self.recording.linears():
            try:
                if matching_columns(_flat(self.mixed), _flat(given)) is not None:
                    raw.append(output)
            except NotFoundError:
                continue
        inputs = [self.recording.before(output).rows for output in raw]
        for given, output in self.recording.modules():
            if any(same(given.rows, one) for one in inputs) or (
                not raw and output.tap.path == self.mixed.tap.path != self.path
            ):
                raw.append(output)
        plain = [_Written(raw=one, added=one) for one in raw if self.fits(one)]
        return plain + [
            _Written(raw=one.raw, added=output, norm=output.tap.path)
            for one in plain
            for given, output in self.recording.modules()
            if same(given.rows, one.raw.rows) and self.fits(output)
        ]

    def other_outputs(self) -> list[_Written]:
        """What else may be added: what any map or module outside attention makes."""
        attending = None if self.mixed is None else self.mixed.tap.path
        outside = [
            seen
            for seen in self.recording.of_kind("linear output", "output")
            if self.fits(seen) and (attending in {None, self.path} or not seen.within(attending))
        ]
        made = [output for _, output in self.recording.linears() if output in outside]
        # The innermost first: of several modules with one output it is the one that makes it.
        return [
            *(_Written(raw=seen, added=seen) for seen in made),
            *(
                _Written(raw=raw, added=output, norm=output.tap.path)
                for given, output in self.recording.modules()
                for raw in made
                if output in outside and output not in made and same(given.rows, raw.rows)
            ),
            *(_Written(raw=seen, added=seen) for seen in outside if seen not in made),
        ]

    def fits(self, seen: Seen) -> bool:
        """Whether it could be a part of the stream."""
        return seen.rows.shape == self.before.rows.shape and seen is not self.after

    def added(self, attention: list[_Written], others: list[_Written]) -> bool:
        """Whether the stream is what it was plus what is written, each perhaps times a number."""
        change = (self.after.rows.double() - self.before.rows.double()).flatten()
        size = torch.finfo(self.after.rows.dtype).eps * float(self.after.rows.abs().max()) or 1.0
        best: tuple[float, tuple[_Written | None, ...], tuple[float, ...]] = (16.0, (), ())
        # Attention's first: a module around it may write it together with the rest.
        groups: list[list[tuple[_Written | None, _Written | None]]] = [
            list(itertools.product(attention, others)),
            [(one, None) for one in attention],
            [(None, one) for one in others],
        ]
        for scaled, pairs in itertools.product((False, True), groups):
            for pair in pairs:
                parts = [one.added.rows.double().flatten() for one in pair if one is not None]
                matrix = torch.stack(parts, dim=1)
                scales = torch.ones(len(parts), dtype=torch.float64, device=matrix.device)
                if scaled:
                    scales = torch.linalg.lstsq(matrix, change[:, None]).solution[:, 0]
                apart = float((change - matrix @ scales).abs().max()) / size
                # Of those that are the same up to the solver's rounding the first is the innermost.
                if apart < best[0] - 1e-3 and float(scales.abs().min()) > 1e-3:
                    best = apart, pair, tuple(scales.tolist())
            if best[1]:
                break
        if not best[1]:
            return False
        scales_left = list(best[2])
        stream = self.before.rows
        for name, one in zip(("attention_write", "mlp_write"), best[1], strict=True):
            if one is None:
                self.reasons[name] = f"it adds nothing of an {name.split('_')[0]}'s to its stream"
                continue
            scale = scales_left.pop(0)
            self.found[name] = Write(tap=one.added.tap, scale=scale, norm=one.norm)
            self.taps[name] = one.added.tap
            if name == "attention_write":
                self.attention_written = one
                stream = stream + scale * one.added.rows
            else:
                self.mlp_written = one
        self.middle = stream
        return True

    def normed_stream(self, attention: list[_Written], others: list[_Written]) -> bool:
        """Whether the stream is normed after attention and MLP added to it, each time."""
        modules = list(self.recording.modules())
        lasts = [pair for pair in modules if same(pair[1].rows, self.after.rows)]
        for one, (given, middle) in itertools.product(attention, modules):
            if not close(given.rows, self.before.rows + one.added.rows):
                continue
            for other, (summed, last) in itertools.product(others, lasts):
                if last.tap.path != self.path and close(
                    summed.rows, middle.rows + other.added.rows
                ):
                    self.attention_written, self.mlp_written = one, other
                    self.middle = middle.rows
                    self.found["stream_norms"] = (middle.tap.path, last.tap.path)
                    self.taps["residual_middle"] = middle.tap
                    for name, it in (("attention_write", one), ("mlp_write", other)):
                        self.found[name] = Write(tap=it.added.tap, scale=1.0, norm=it.norm)
                        self.taps[name] = it.added.tap
                    return True
        return False

    def mixing(self) -> Mixing:
        """The map from mixed values to what attention writes."""
        if self.mixed is None or self.attention_written is None:
            raise NotFoundError("what attention writes was not found")
        output = self.attention_written.raw
        given = self.recording.before(output)
        columns = matching_columns(_flat(self.mixed), _flat(given))
        if columns is None or columns[1] != 1.0:
            raise NotFoundError(f"{output.tap.path} does not read the mixed values as they are")
        return Mixing(
            linear=as_linear(self.model, given, output),
            columns=columns[0].unflatten(0, (self.mixed.heads or 1, -1)),
            reads=given.tap,
            writes=output.tap,
        )

    def mlp(self) -> None:
        """What the MLP is made of, and what attention's output is."""
        if self.mixed is not None:
            self.attempt("mixing", self.mixing)
        if self.mlp_written is None:
            self.reasons["neurons"] = self.reasons["mlp_write"]
            return
        raw = self.mlp_written.raw
        neurons = self.attempt("neurons", lambda: find_neurons(self.model, self.recording, raw))
        read = self.recording.before(raw).tap if neurons is None else neurons.reads
        if neurons is not None:
            self.taps["mlp_post"] = neurons.post
            if neurons.pre is not None:
                self.taps["mlp_pre"] = neurons.pre
            else:
                self.reasons["mlp_pre"] = (
                    "no linear map's output makes the post-activations, number by number"
                )
        if read is None:
            return
        streams = [stream for stream in (self.middle, self.before.rows) if stream is not None]
        which = self.reads("mlp", self.recording.at[read], *streams)
        if which is None:
            self.reasons["mlp_norm"] = "the MLP reads neither the residual stream nor a norm of it"
        self.found["parallel"] = which == 1


def _flat(seen: Seen) -> Tensor:
    return seen.rows.flatten(0, 1)
