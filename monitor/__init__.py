"""phasewatch: see the insides of a transformer change while it trains.

Reading what was measured needs no torch: `tables`, `read` and `connect`, for directions `settling`,
and for several runs `formations`, `universality` and `leads`. Measuring is in `monitor.measure`.
"""

from __future__ import annotations

from monitor.across import formations, leads, universality
from monitor.query import connect, read, tables
from monitor.settling import settling

__all__ = ["connect", "formations", "leads", "read", "settling", "tables", "universality"]
