"""phasewatch: see the insides of a transformer change while it trains.

Reading what was measured needs no torch: `tables`, `read` and `connect`. Measuring is in
`monitor.measure`.
"""

from __future__ import annotations

from monitor.query import connect, read, tables

__all__ = ["connect", "read", "tables"]
