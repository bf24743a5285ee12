"""All that is wanted of the stream in one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from monitor.parts import Parts
from monitor.parts.flow import Tap
from monitor.stimuli import Stimulus
from monitor.streams.attributing import Attributing
from monitor.streams.attribution import AttributionSums
from monitor.streams.lens import LensSums, through_lens
from monitor.streams.reading import UnseenError
from monitor.streams.sample import Sampler, StreamSample

Kind = Literal["stream", "lens", "attribution"]

_Reader = Sampler | Attributing
_READERS: tuple[tuple[Sequence[Kind], Callable[[Parts, Stimulus], _Reader]], ...] = (
    (("stream", "lens"), Sampler),
    (("attribution",), Attributing),
)


class Streams:
    """Sees what is wanted of the stream while a model runs, to be asked for afterwards.

    Nothing here raises: what cannot be seen is None, and `reasons` say why, by the names of the
    kinds. The pass around it goes on.
    """

    def __init__(self, parts: Parts, stimulus: Stimulus, kinds: Collection[Kind]) -> None:
        self.reasons: dict[str, str] = {}
        self._parts = parts
        self._readers: dict[Kind, _Reader] = {}
        for of_reader, reader in _READERS:
            if asked := [kind for kind in of_reader if kind in kinds]:
                try:
                    self._readers |= dict.fromkeys(asked, reader(parts, stimulus))
                except Exception as error:
                    self.reasons |= dict.fromkeys(asked, _why(error))

    @property
    def waiting(self) -> bool:
        """Whether something that is wanted did not pass yet."""
        return any(reader.left for reader in self._readers.values())

    def see(self, tap: Tap, tensor: Tensor) -> None:
        """Takes what passes."""
        for reader in set(self._readers.values()):
            if tap not in reader.left:
                continue
            try:
                # What is summed up here is no part of the model, and nobody who follows its
                # functions should take it for one.
                with torch._C.DisableTorchFunction():
                    reader.see(tap, tensor)
            except Exception as error:
                for kind in [kind for kind, its in self._readers.items() if its is reader]:
                    self._give_up(kind, error)

    def stream(self) -> StreamSample | None:
        """A sample of the stream."""
        sampler = self._sampler("stream")
        if sampler is None:
            return None
        return StreamSample(rows=sampler.rows().float().cpu(), positions=sampler.positions)

    def lens(self) -> LensSums | None:
        """What the unembedding would make of the sample."""
        if (sampler := self._sampler("lens")) is not None:
            try:
                # The unembedding is as large as many a block: of all samples it would take as long
                # as a third of the pass.
                return through_lens(self._parts, *sampler.predictions())
            except Exception as error:
                self._give_up("lens", error)
        return None

    def attribution(self) -> AttributionSums | None:
        """What every component writes towards the correct next token."""
        if isinstance(reader := self._whole("attribution"), Attributing):
            try:
                return reader.sums()
            except Exception as error:
                self._give_up("attribution", error)
        return None

    def _sampler(self, kind: Kind) -> Sampler | None:
        reader = self._whole(kind)
        return reader if isinstance(reader, Sampler) else None

    def _whole(self, kind: Kind) -> _Reader | None:
        reader = self._readers.get(kind)
        if reader is not None and reader.left:
            where = ", ".join(sorted(f"the {tap.kind} of {tap.path}" for tap in reader.left))
            self._give_up(kind, UnseenError(f"not seen in this pass: {where}"))
        return self._readers.get(kind)

    def _give_up(self, kind: Kind, error: Exception) -> None:
        self._readers.pop(kind, None)
        self.reasons[kind] = _why(error)


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, UnseenError) else f"{type(error).__name__}: {error}"
