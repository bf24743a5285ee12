"""Whether the weights that are measured are one chain, each come from those before.

Shapes: `projection` the numbers of a sketch of weights.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

# How far weights have come at a measurement is compared with so many measurements before.
_COMPARED = 5
_FEWEST = 3

# A jump is so many times as fast as the fastest of those, and so large beside the weights.
_FASTER, _FAR = 6.0, 0.5

# Weights that are so much nearer to those before the last than to the last have come back, if that
# was further than large steps swing to and fro.
_CAME_BACK, _SWING = 0.5, 0.1


class Chain:
    """Follows digests and sketches of weights through a run.

    A chain is broken where weights are, bit for bit, those of an earlier measurement (but for the
    last one: training may rest); where they are suddenly far away; and where they are nearer to
    those of the measurement before the last than to those of the last, which then were from
    elsewhere. Learning rates that rise, fall or begin anew do none of that. What fools it: weights
    of another time that are near, as late in training all are; and a training that diverges from
    one measurement to the next, whose weights are far away.
    """

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._steps: list[int] = []
        self._sketches: list[Float[np.ndarray, " projection"]] = []
        self._speeds: list[float] = []

    def take(self, step: int, digest: str, sketch: Float[np.ndarray, " projection"]) -> str | None:
        """Why the chain is broken at a step; None where it is not."""
        now = sketch.astype(float)
        known, last = self._seen.get(digest), self._steps[-1] if self._steps else None
        self._seen.setdefault(digest, step)
        if known is not None and known == last:
            # As good as the same measurement: training rested.
            self._seen[digest] = self._steps[-1] = step
            return None
        why = None if known is None else f"its weights are those of step {known}"
        if why is None and self._sketches and len(now) == len(self._sketches[-1]):
            why = self._moved(step, now)
        if why is not None:
            self._sketches, self._speeds, self._steps = [], [], []
        self._steps.append(step)
        self._sketches = [*self._sketches[-1:], now]
        return why

    def _moved(self, step: int, now: Float[np.ndarray, " projection"]) -> str | None:
        """Why weights cannot have come from those of the last measurements."""
        last = self._sketches[-1]
        distance, size = float(np.linalg.norm(now - last)), float(np.linalg.norm(last))
        speed = distance / max(1, step - self._steps[-1])
        fastest = max(self._speeds[-_COMPARED:], default=0.0)
        compared = len(self._speeds) >= _FEWEST
        self._speeds.append(speed)
        if compared and speed > _FASTER * fastest and distance > _FAR * size:
            return f"its weights are far from those of step {self._steps[-1]}"
        if len(self._sketches) > 1:
            back = float(np.linalg.norm(now - self._sketches[-2]))
            if back < _CAME_BACK * distance and distance > _SWING * size:
                return f"the weights of step {self._steps[-1]} were from elsewhere"
        return None
