"""What has formed, said at once: a number that has left its null behind at two measurements in a
row, or a claim that was made twice.

That something is there needs no history, as a change does, and says nothing of how suddenly it
came. What must lie beyond its null by three standard deviations and a tenth of its way is seldom
there by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool

from monitor.detection.events import EVENTS, Passing, Seen
from monitor.detection.events import Event as Kind
from monitor.transitions import Event
from monitor.transitions.online import State


@dataclass(slots=True)
class _Watched:
    """One kind of event: since when, and in which series (which heads), it is there."""

    kind: Kind
    since: int = 0
    held: Bool[np.ndarray, " series"] | None = None
    formed: bool = False

    def say(self, held: Bool[np.ndarray, " series"], step: int) -> State | None:
        """What is new, of the series in which it is there at `step`."""
        before, self.held = self.held, held if held.any() else None
        if before is not None and before.shape == held.shape and (before & held).any():
            self.formed = True
            return "confirmed"
        if before is None and self.held is not None:
            self.since = step
            return "provisional"
        if before is not None:
            # In another series it may begin anew at the next measurement.
            self.held = None
            return "retracted"
        return None


class Forming:
    """Follows what may form in a run. Where it is there for the first time it is provisional; the
    next measurement confirms it where it is there in the same series (the same head), and else
    retracts it. What has formed is said once.
    """

    def __init__(self, kinds: Sequence[Kind] = EVENTS) -> None:
        self._watched = [_Watched(kind=kind) for kind in kinds]

    @property
    def tables(self) -> set[str]:
        """The names of the tables that it still looks at."""
        return {one.kind.table for one in self._watched if not one.formed}

    def take(self, step: int, tables: Mapping[str, pd.DataFrame]) -> list[Event]:
        """What a measurement says of what forms; `tables` are its tables by their names."""
        events = []
        for one in self._watched:
            if one.formed or one.kind.table not in tables:
                continue
            try:
                seen = one.kind.see(tables[one.kind.table])
            except ValueError:
                # Of the table other fields were asked for.
                continue
            if not seen.measured.any():
                continue
            state = one.say(seen.held[-1], step)
            if state is not None:
                events.append(_event(one, seen, state, step))
        return events


def _event(one: _Watched, seen: Seen, state: State, step: int) -> Event:
    strength = seen.strength[-1][seen.measured[-1]]
    return Event(
        series=f"{one.kind.name} formed",
        state=state,
        direction="up",
        step=step,
        onset=one.since,
        score=float(np.max(strength)),
        threshold=one.kind.share if isinstance(one.kind, Passing) else 1.0,
    )
