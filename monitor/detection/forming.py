"""What has formed, said once: a number that has left its null behind, or a claim, which was there
for as long as measurements usually lie apart.

That something is there needs no history, as a change does, and says nothing of how suddenly it
came. What must lie beyond its null by three standard deviations and a tenth of its way is seldom
there by chance; but what lies near to that comes and goes. While something is provisional it is
measured more often, and measurements a few steps apart, of weights that are nearly the same, are
hardly two. So it is there for a usual interval before it is confirmed, and goes back only where it
falls below two thirds of what it took.
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
    """One kind of event: since when, and in which series (which heads), it is there, and how long
    it must be.
    """

    kind: Kind
    since: int = 0
    lasting: int = 0
    there: Bool[np.ndarray, " series"] | None = None
    formed: bool = False

    def say(self, seen: Seen, step: int, interval: int) -> State | None:
        """What is new, of the series in which it is there at `step`."""
        held, lingers = seen.held[-1], seen.lingers[-1]
        if self.there is None:
            if not held.any():
                return None
            self.since, self.lasting, self.there = step, interval, held
            return "provisional"
        # In a series that was not measured now nothing has changed.
        still = lingers | ~seen.measured[-1]
        self.there = self.there & still if self.there.shape == still.shape else None
        if self.there is None or not self.there.any():
            # In another series it may begin anew at the next measurement.
            self.there = None
            return "retracted"
        if step - self.since >= self.lasting and (self.there & held).any():
            self.formed = True
            return "confirmed"
        return None


class Forming:
    """Follows what may form in a run. Where it is there for the first time it is provisional. It is
    confirmed where it was in the same series (the same head) for a usual interval between
    measurements, and is there fully then; retracted where it is not there any more before that.
    What has formed is said once.
    """

    def __init__(self, kinds: Sequence[Kind] = EVENTS) -> None:
        self._watched = [_Watched(kind=kind) for kind in kinds]

    @property
    def tables(self) -> set[str]:
        """The names of the tables that it still looks at."""
        return {one.kind.table for one in self._watched if not one.formed}

    def take(
        self, step: int, tables: Mapping[str, pd.DataFrame], *, interval: int = 0
    ) -> list[Event]:
        """What a measurement says of what forms; `tables` are its tables by their names.

        `interval` is how many steps usually pass from one measurement to the next; 0: not known,
        and then the next one decides.
        """
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
            state = one.say(seen, step, interval)
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
