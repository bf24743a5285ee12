"""Thin adapters between trainers and the monitor: they choose when to measure, and hand over.

`TrainingDynamics` is the callback for Lightning; `callbacks.huggingface` has the one for the
Trainer of transformers. Neither package is imported before its callback is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.lightning import TrainingDynamics

__all__ = ["TrainingDynamics"]


def __getattr__(name: str) -> Any:
    if name == "TrainingDynamics":
        from callbacks.lightning import TrainingDynamics

        return TrainingDynamics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
