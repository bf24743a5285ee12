"""When an event formed, by looking at one number after the other: slow and obvious."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scipy.stats import norm, t

Head = tuple[int, int]


def holds(value: float, stderr: float, null: float, n: int, *, full: float = 1.0) -> bool | None:
    """Whether a tenth of the way from the null to `full` is gone, three deviations beyond the null.

    None where it was not measured.
    """
    if math.isnan(value) or math.isnan(stderr):
        return None
    sign = 1 if full > null else -1
    gone = sign * (value - null)
    distance = t(n - 1).ppf(norm.cdf(3.0))
    return gone >= 0.1 * abs(full - null) and gone > distance * stderr


def first_formed(
    heads: Mapping[Head, Sequence[bool | None]], values: Mapping[Head, Sequence[float]]
) -> tuple[int | None, int, Head] | None:
    """The measurement before, that at which it formed, and the head; None where it did not.

    Of heads that are known to have formed at the same measurement, the one with the largest value.
    """
    known: dict[int, list[tuple[float, int | None, int, Head]]] = {}
    for head, held in heads.items():
        measured = [at for at, holding in enumerate(held) if holding is not None]
        for place in range(1, len(measured)):
            one, two = measured[place - 1], measured[place]
            if held[one] and held[two]:
                before = measured[place - 2] if place >= 2 else None
                known.setdefault(two, []).append((values[head][two], before, one, head))
                break
    if not known:
        return None
    _, before, at, head = max(known[min(known)], key=lambda found: found[0])
    return before, at, head
