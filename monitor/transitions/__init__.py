"""Transitions in a series: found, told only where nothing smooth explains them, and measured."""

from monitor.transitions.offline import Transition, fit

__all__ = ["Transition", "fit"]
