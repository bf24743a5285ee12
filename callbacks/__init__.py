"""Thin adapters between trainers and the monitor: they choose when to measure, and hand over."""

from __future__ import annotations

from callbacks.lightning import TrainingDynamics

__all__ = ["TrainingDynamics"]
