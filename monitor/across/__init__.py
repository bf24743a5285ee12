"""Several runs on one axis: what formed in each, when, and in how many of them."""

from monitor.across.fitted import apart, early_warnings, fitted
from monitor.across.formed import formations
from monitor.across.pooled import leads, universality
from monitor.detection.events import EVENTS, Claim, Event, Passing

__all__ = [
    "EVENTS",
    "Claim",
    "Event",
    "Passing",
    "apart",
    "early_warnings",
    "fitted",
    "formations",
    "leads",
    "universality",
]
