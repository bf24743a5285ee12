"""Transitions in a series: found, told only where nothing smooth explains them, and measured."""

from monitor.transitions.offline import Transition, fit
from monitor.transitions.online import Event, OnlineDetector

__all__ = ["Event", "OnlineDetector", "Transition", "fit"]
