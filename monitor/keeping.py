"""Weights from around transitions: the last few measurements' are always there, and those from
before, at and after the beginning of a transition stay.

    <root>/_checkpoints/run=<run>/<step, 12 digits>.pt     weights at a step, for `load_state_dict`
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from monitor.detection import Notice
from monitor.replacing import replacing
from monitor.sinks import SUPERSEDED

_log = logging.getLogger("phasewatch")

FOLDER = "_checkpoints"

CHECKPOINT_BYTES = 256 * 2**20
"""What weights take on disk at most, unless a user says otherwise."""

# The weights of so many measurements are there, in case one of them turns out to be the last before
# something begins.
RING = 4


class Keeper:
    """Writes the weights at every measurement, and deletes those that nobody needs.

    All files together take at most `most_bytes`; where a ring of `RING` does not fit, nothing is
    written. What an earlier attempt of the run kept counts, and stays.

    Raises `OSError` where the folder cannot be made.
    """

    def __init__(self, root: Path, run: str, *, most_bytes: int) -> None:
        self._root, self._folder = root, root / FOLDER / f"run={run}"
        self._most_bytes = most_bytes
        self._ring: list[int] = []
        # By series, which steps are kept for the transition that is under way.
        self._during: dict[str, list[int]] = {}
        self._kept: set[int] = set()
        self._said = False

    def begin(self, after: int) -> None:
        """Sets aside what was kept beyond step `after`, of which the run goes on."""
        for path in self._folder.glob("*.pt"):
            step = int(path.stem)
            if step > after:
                aside = self._root / SUPERSEDED / FOLDER / self._folder.name
                aside.mkdir(parents=True, exist_ok=True)
                path.replace(aside / path.name)
            else:
                self._kept.add(step)

    def keep(self, model: nn.Module, step: int, notices: Sequence[Notice]) -> tuple[Notice, ...]:
        """Writes the weights of a measurement, and returns its notices with what is kept for them.

        Raises `OSError` where they cannot be written.
        """
        weights = model.state_dict()
        size = sum(tensor.nbytes for tensor in _distinct(weights.values()))
        if RING * size > self._most_bytes:
            self._say(
                "no weights are kept around transitions: those of %d measurements take %.0f MiB, "
                "and checkpoint_bytes is %.0f MiB",
                RING,
                RING * size / 2**20,
                self._most_bytes / 2**20,
            )
            return tuple(notices)
        self._write(weights, step)
        self._ring = [*(at for at in self._ring if at != step), step]
        told = tuple(self._told(notice, step, size) for notice in notices)
        self._forget()
        return told

    def _told(self, notice: Notice, step: int, size: int) -> Notice:
        """The notice with what is kept for it from now on."""
        event = notice.event
        if event.state == "retracted":
            self._kept -= {*self._during.pop(event.series, ())} - {
                at for others in self._during.values() for at in others
            }
            return notice
        before = [at for at in self._ring if at < event.onset]
        wanted = [*before[-1:], step] if event.state == "provisional" else [step]
        steps = self._during.setdefault(event.series, [])
        for at in wanted:
            if at in self._kept or (len(self._kept) + RING) * size < self._most_bytes:
                self._kept.add(at)
                steps.append(at)
            else:
                self._say(
                    "no more weights are kept around transitions: those of %d steps under %s take "
                    "what checkpoint_bytes allows",
                    len(self._kept),
                    self._folder,
                )
        if event.state == "confirmed":
            del self._during[event.series]
        files = (self._path(at).relative_to(self._root).as_posix() for at in dict.fromkeys(steps))
        return dataclasses.replace(notice, checkpoints=tuple(files))

    def _forget(self) -> None:
        """Deletes what has left the ring, and what is no longer kept."""
        self._ring = self._ring[-RING:]
        needed = {*self._ring, *self._kept}
        for path in self._folder.glob("*.pt"):
            if int(path.stem) not in needed:
                path.unlink()

    def _write(self, weights: dict[str, Tensor], step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(step)) as temporary:
            torch.save({name: tensor.detach().cpu() for name, tensor in weights.items()}, temporary)

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:012d}.pt"

    def _say(self, message: str, *values: object) -> None:
        if not self._said:
            self._said = True
            _log.info(message + " (said once)", *values)


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tied weights are one."""
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())
