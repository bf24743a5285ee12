"""Everything that flowed through a model in one short pass, and what equals what in it.

Shapes: `row` is one position of one sequence; a tensor has one `column` a feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from monitor.anatomy import LanguageModel
from monitor.parts.flow import Kind, Map, Tap, position_first, rows, run

# Few, since everything is kept. A tensor's axes are told apart by their sizes: where a model has as
# many heads as there are positions, the next number is taken.
_BATCH, _POSITIONS = 6, (7, 9)

_ATTENTION: tuple[Kind, ...] = ("query", "key", "value", "mixed")


class NotFoundError(Exception):
    """Why a part of a model was not found."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """A tensor that flowed through `tap` (perhaps with its position axis first), and for the output
    of a linear map, that. Kept alive, `origin` can be told from others of the same values.
    """

    tap: Tap
    rows: Float[Tensor, "batch position column"]
    origin: Tensor
    heads: int | None = None
    linear: Map | None = None
    transposed: bool = False

    def within(self, path: str) -> bool:
        """Whether it was seen in the module at `path`."""
        return f"{self.tap.path}.".startswith(f"{path}." if path else "")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recording:
    """What flowed, in order."""

    tokens: Int[Tensor, "batch position"]
    seen: tuple[Seen, ...]
    logits: Float[Tensor, "batch position vocabulary"]
    at: dict[Tap, Seen] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", {seen.tap: seen for seen in self.seen})

    @classmethod
    def of(cls, model: LanguageModel, *, seed: int) -> Recording:
        """A pass on `some_tokens`."""
        for positions in _POSITIONS:
            recording = cls._of(model, some_tokens(model, seed=seed, positions=positions))
            if all(seen.heads != positions for seen in recording.seen):
                break
        return recording

    @classmethod
    def _of(cls, model: LanguageModel, tokens: Int[Tensor, "batch position"]) -> Recording:
        kept: list[Seen] = []

        def keep(tap: Tap, tensor: Tensor, linear: Map | None) -> None:
            heads = tensor.shape[1] if tap.kind in _ATTENTION else None
            flat = tensor.transpose(1, 2).flatten(2) if heads else None
            transposed = position_first(tensor, tokens)
            if heads is None:
                flat = rows(tensor, tokens, transposed=transposed)
            if flat is not None:
                # Kept as it is now: what follows may write into it.
                kept.append(
                    Seen(
                        tap=tap,
                        rows=flat.clone(),
                        origin=tensor,
                        heads=heads,
                        linear=linear,
                        transposed=transposed,
                    )
                )

        logits = run(model, tokens, keep)
        return cls(tokens=tokens, seen=tuple(kept), logits=logits)

    def within(self, path: str) -> Recording:
        """What of it was in the module at `path`."""
        inside = tuple(seen for seen in self.seen if seen.within(path))
        return Recording(tokens=self.tokens, seen=inside, logits=self.logits)

    def of_kind(self, *kinds: Kind) -> list[Seen]:
        """What of it is of one of the kinds."""
        return [seen for seen in self.seen if seen.tap.kind in kinds]

    def modules(self) -> Iterator[tuple[Seen, Seen]]:
        """What modules made of what, innermost first."""
        for output in self.of_kind("output"):
            given = self.at.get(Tap(output.tap.path, "input", output.tap.number))
            if given is not None:
                yield given, output

    def linears(self) -> Iterator[tuple[Seen, Seen]]:
        """What linear maps made of what; then what modules around them did, which may be maps too.

        In the place of a map stands the module around it that does the same, where that does it
        with more maps than one: an adapter that is zero now need not be zero later.
        """
        made = self.of_kind("linear output")
        modules = [
            (given, output, [one for one in made if one.within(output.tap.path)])
            for given, output in self.modules()
        ]
        for output in made:
            given = self.before(output)
            yield next(
                (
                    (read, around)
                    for read, around, inside in modules
                    if len(inside) > 1
                    and output in inside
                    and same(around.rows, output.rows)
                    and same(read.rows, given.rows)
                ),
                (given, output),
            )
        for given, output, inside in modules:
            if inside and not any(same(one.rows, output.rows) for one in inside):
                yield given, output

    def before(self, output: Seen) -> Seen:
        """What a linear map, or a module, read to make `output`."""
        kind: Kind = "input" if output.tap.kind == "output" else "linear input"
        return self.at[Tap(output.tap.path, kind, output.tap.number)]

    def reader_of(self, stream: Tensor, read: Seen) -> str | None:
        """The path of the module that makes what is `read` of `stream`."""
        found = [
            made
            for given, made in self.modules()
            if same(made.rows, read.rows) and close(given.rows, stream)
        ]
        # Norms that were not trained yet all make the same of a stream.
        memory = read.origin.untyped_storage().data_ptr()
        found.sort(key=lambda made: made.origin.untyped_storage().data_ptr() != memory)
        return found[0].tap.path if found else None


def some_tokens(
    model: LanguageModel, *, seed: int, positions: int = _POSITIONS[0]
) -> Int[Tensor, "batch position"]:
    """A few sequences of random tokens, no two with the same first one if possible."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (_BATCH, positions), generator=generator)
    first = torch.randperm(model.vocab_size, generator=generator)[:_BATCH]
    tokens[: len(first), 0] = first
    return tokens.to(model.device)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    return one.shape == other.shape and torch.equal(one, other)


def error(one: Tensor, other: Tensor) -> float:
    """How far two tensors are apart, in units of the rounding of the larger."""
    if one.shape != other.shape:
        return float("inf")
    size = float(other.abs().max()) * torch.finfo(other.dtype).eps
    difference = float((one.double() - other.double()).abs().max())
    return difference / size if size else difference * float("inf") if difference else 0.0


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of a few sums."""
    return error(one, other) < 16


def matching_columns(
    target: Float[Tensor, "row column"], source: Float[Tensor, "row other"]
) -> tuple[Int[Tensor, " column"], float] | None:
    """Which column of `source`, times one number for all, each column of `target` is.

    Raises `NotFoundError` where several columns could be it.
    """
    eps = torch.finfo(target.dtype).eps
    tolerance = max(1e-9, 4 * eps**2)
    wanted, given = target.double(), source.double()
    size = wanted.norm(dim=0)
    if not bool((size > 0).all()):
        raise NotFoundError("some of its columns are zero everywhere, and cannot be told apart")
    if len(target) != len(source):
        return None
    units, directions = wanted / size, given / given.norm(dim=0).clamp(min=1e-300)
    indices, several = [], False
    # The first few tell most pairs apart, and the cosines of all would be as large as a weight.
    for some in units.split(256, dim=1):
        cosines = some.T @ directions
        best, index = cosines.max(dim=1)
        if bool((1 - best > tolerance).any()):
            return None
        cosines.scatter_(1, index[:, None], -1.0)
        several |= bool((1 - cosines.max(dim=1).values <= 4 * (1 - best) + 1e-12).any())
        indices.append(index)
    if several:
        raise NotFoundError("several columns of one map have the same values")
    index = torch.cat(indices)
    scales = size / given[:, index].norm(dim=0)
    scale = float(scales.median())
    if bool(((scales - scale).abs() > max(1e-5, 4 * eps) * abs(scale)).any()):
        return None
    return index, 1.0 if abs(scale - 1) < max(1e-6, eps) else scale
