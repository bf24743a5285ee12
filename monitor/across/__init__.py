"""Several runs on one axis: what formed in each, when, and in how many of them."""

from monitor.across.events import EVENTS, Claim, Event, Passing
from monitor.across.formed import formations
from monitor.across.pooled import leads, universality

__all__ = ["EVENTS", "Claim", "Event", "Passing", "formations", "leads", "universality"]
