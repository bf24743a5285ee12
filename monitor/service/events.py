"""What is new since one looked last: measurements, and states of runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

Seen = Mapping[str, tuple[str, Mapping[int, frozenset[str]]]]
"""Of every run its state, and by measured step the tables."""


class News:
    """Server-sent events of what differs from `seen`, look by look.

    The tables of a measurement are written one by one: it is told of once none came since the last
    look, and only then what is said of the state of its run.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = self._told = seen

    def look(self, seen: Seen) -> Iterator[str]:
        """The events that are due."""
        told: dict[str, tuple[str, dict[int, frozenset[str]]]] = {}
        for run, (state, steps) in seen.items():
            state_before, known = self._told.get(run, ("", {}))
            _, at_last_look = self._seen.get(run, ("", {}))
            # A step that is known, and gone, may come again.
            told_steps = {step: known[step] for step in steps if step in known}
            for step in sorted(steps):
                new = steps[step] - known.get(step, frozenset())
                if new and steps[step] == at_last_look.get(step):
                    told_steps[step] = steps[step]
                    yield _event("measurement", run=run, step=step, tables=sorted(new))
            if told_steps == steps and state != state_before:
                state_before = state
                yield _event("state", run=run, state=state)
            told[run] = (state_before, told_steps)
        for run in self._told.keys() - seen.keys():
            yield _event("state", run=run, state="gone")
        self._seen, self._told = seen, told


def _event(kind: str, **told: object) -> str:
    return f"event: {kind}\ndata: {json.dumps(told)}\n\n"
