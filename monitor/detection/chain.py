"""Whether the weights that are measured are one chain, each come from those before.

Shapes: `projection` the numbers of a sketch of weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

# How far weights have come at a measurement is compared with so many measurements before.
_COMPARED = 5
_FEWEST = 3

# A jump is so many times as fast as the fastest of those, and so large beside the weights.
_FASTER, _FAR = 6.0, 0.5

# Weights that are so much nearer to some than to others are taken for theirs; they have come back
# only if they were further away than large steps swing to and fro.
_NEARER, _SWING = 0.5, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """Weights that do not come from those before: the reason, and the first step of them, which
    can be earlier than the step at which that is known.
    """

    why: str
    since: int


class Chain:
    """Follows digests and sketches of weights through a run.

    A chain is broken where weights are, bit for bit, those of an earlier measurement (but for the
    last one: training may rest); where they are suddenly far away; and where they are nearer to
    those of the measurement before the last, or before the last break, than to those of the last,
    which then were from elsewhere. Of weights that come twice those are misplaced that are further
    from their neighbour, so that early steps at which late weights were served are known for it
    when these come at their own step. Learning rates that rise, fall or begin anew do none of that
    unless training diverges.

    What fools it: weights of another time that are near and not met twice, as late in training all
    are; and a training that diverges from one measurement to the next, whose weights are far away.
    Of weights that are not finite only the digest counts.
    """

    def __init__(self) -> None:
        # By digest its latest step, and by that the step that came then and how far away it was.
        self._seen: dict[str, int] = {}
        self._left: dict[int, tuple[int, float]] = {}
        self._last: int | None = None
        # Of the last two measurements, and of the last one before the latest break.
        self._sketches: list[Float[np.ndarray, " projection"]] = []
        self._before: list[Float[np.ndarray, " projection"]] = []
        self._speeds: list[float] = []

    def take(
        self, step: int, digest: str, sketch: Float[np.ndarray, " projection"]
    ) -> tuple[Break, ...]:
        """Where the chain is broken, as far as a step tells of it; nothing where it is not."""
        now, known, last = sketch.astype(float), self._seen.get(digest), self._last
        self._seen[digest] = self._last = step
        if last is None or known == last:
            # Training rested, or begins.
            self._sketches = self._sketches or [now]
            return ()
        comparable = len(self._sketches) > 0 and len(now) == len(self._sketches[-1])
        distance = float(np.linalg.norm(now - self._sketches[-1])) if comparable else math.nan
        self._left[last] = (step, distance)
        if known is not None:
            broken = self._repeated(step, known, distance)
        else:
            why = self._moved(now, distance, before=last, steps=step - last)
            broken = () if why is None else (Break(why=why, since=step),)
        if any(one.since == step for one in broken):
            self._before = self._sketches[-1:]
            self._sketches, self._speeds = [], []
        self._sketches = [*self._sketches[-1:], now]
        return broken

    def _repeated(self, step: int, known: int, distance: float) -> tuple[Break, ...]:
        """Weights that were there before: which of the two are misplaced, or both may be."""
        then, far = self._left[known]
        early = Break(why=f"the weights of step {known} were those of step {step}", since=then)
        late = Break(why=f"its weights are those of step {known}", since=step)
        if distance < _NEARER * far:
            return (early,)
        return (early, late) if distance * _NEARER < far else (late,)

    def _moved(
        self, now: Float[np.ndarray, " projection"], distance: float, *, before: int, steps: int
    ) -> str | None:
        """Why weights cannot have come from those of the last measurements."""
        if not math.isfinite(distance):
            self._speeds = []
            return None
        size, speed = float(np.linalg.norm(self._sketches[-1])), distance / max(1, steps)
        fastest = max(self._speeds[-_COMPARED:], default=0.0)
        compared = len(self._speeds) >= _FEWEST
        self._speeds.append(speed)
        if compared and speed > _FASTER * fastest and distance > _FAR * size:
            return f"its weights are far from those of step {before}"
        for earlier in (*self._sketches[:-1], *self._before):
            back = float(np.linalg.norm(now - earlier))
            if back < _NEARER * distance and distance > _SWING * size:
                return f"the weights of step {before} were from elsewhere"
        return None
