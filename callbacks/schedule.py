"""When to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Measure at each of `steps`, and at every multiple of `every` beyond `after`."""

    steps: frozenset[int] = frozenset()
    every: int | None = None
    after: int = -1

    @classmethod
    def of(cls, wanted: int | Iterable[int] | None) -> Schedule:
        """The schedule that a user asked for.

        None: steps 0, 1, 2, 4, … 512 and then every 1,000, the checkpoints of the Pythia suite
        (Biderman et al. 2023). A number: every so many steps, from step 0 on. Several numbers:
        exactly those steps. Raises `ValueError` where that never fires.
        """
        if wanted is None:
            return cls(steps=frozenset([0, *(2**k for k in range(10))]), every=1_000, after=512)
        expected = "expected a number of steps (at least 1), a list of steps, or None"
        if type(wanted) is int and wanted > 0:
            return cls(every=wanted)
        if isinstance(wanted, Iterable) and not isinstance(wanted, str | bytes):
            steps = list(wanted)
            if steps and all(type(step) is int and step >= 0 for step in steps):
                return cls(steps=frozenset(steps))
        raise ValueError(f"schedule={wanted!r} never fires: {expected}")

    def due(self, step: int) -> bool:
        """Whether to measure at `step`."""
        by_number = self.every is not None and step > self.after and step % self.every == 0
        return step in self.steps or by_number

    def check_fires(self, first: int, last: float) -> None:
        """Raises `ValueError` where nothing is due after step `first` and up to `last`."""
        at_steps = any(first < step <= last for step in self.steps)
        if self.every is None:
            at_number = False
        else:
            following = max(first, self.after) // self.every * self.every + self.every
            at_number = following <= last
        if not at_steps and not at_number:
            raise ValueError(
                f"schedule never fires in this training, which goes from step {first} to "
                f"{last:.0f}: {self}; pass a smaller schedule="
            )
