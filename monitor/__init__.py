"""phasewatch: see the insides of a transformer change while it trains.

Reading what was measured needs no torch: `tables`, `read` and `connect`, for directions `settling`,
for several runs `formations`, `universality` and `leads`, and for transitions fitted to whole runs
`fitted`, `apart` and `early_warnings`. Measuring is in `monitor.measure`.
"""

from __future__ import annotations

from monitor.across import apart, early_warnings, fitted, formations, leads, universality
from monitor.query import connect, read, tables
from monitor.settling import settling

__all__ = [
    "apart",
    "connect",
    "early_warnings",
    "fitted",
    "formations",
    "leads",
    "read",
    "settling",
    "tables",
    "universality",
]
