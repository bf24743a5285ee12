"""The table `transitions`: what was said of which series, at the step at which it was said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from monitor.record import Dim, Field, Moment, ProbeSpec, Reading
from monitor.transitions import Event, Transition

BROKEN = "chain of checkpoints"
"""What the series of a break is called: weights that do not come from those before."""

Kind = Literal["change", "formation", "break"]

_UNTIL_THEN = "Fitted to what was measured until then; missing where no fit is clear yet."


def _words(name: str, help_text: str) -> Field:
    return Field(name=name, help=help_text, text=True, stderr=False)


def _number(name: str, help_text: str, unit: str = "") -> Field:
    return Field(name=name, help=help_text, unit=unit, stderr=False)


def _fitted(name: str, help_text: str, unit: str = "") -> tuple[Field, ...]:
    return (
        _number(name, f"{help_text} {_UNTIL_THEN}", unit),
        _number(f"{name}_low", f"Lower end of the 95% interval of {name}.", unit),
        _number(f"{name}_high", f"Upper end of the 95% interval of {name}.", unit),
    )


_FITTED = (
    *_fitted("onset", "Step at which a tenth of the change was gone.", "steps"),
    *_fitted("midpoint", "Step at which half of the change was gone.", "steps"),
    *_fitted("end", "Step at which nine tenths of the change were gone.", "steps"),
    *_fitted("width", "From onset to end.", "steps"),
    *_fitted("height", "How far the series went, without the sign."),
    _number(
        "delta_bic",
        "By how much the BIC of a transition beats that of the best smooth curve. " + _UNTIL_THEN,
    ),
)

SPEC = ProbeSpec(
    name="transitions",
    help="What was said of a series while it was measured: a row for each time that a transition "
    "was provisional (it begins), confirmed (it still holds some measurements later) or retracted "
    "(it does not). Rows stay as they were said. n: measurements of the series until then.",
    source="monitor.transitions: changes weighed against smooth curves with autocorrelated noise",
    dims=(Dim(name="series", help="What was followed.", text=True),),
    fields=(
        _words("state", "provisional, confirmed or retracted."),
        _words(
            "kind",
            "change: the series went from one level to another; formation: a number has left its "
            "null behind by a tenth of its way and by three standard deviations, or a claim is "
            "made, and is so for a usual interval between measurements; break: the weights do not "
            "come from those measured before, and no change is claimed across it.",
        ),
        _words("direction", "up or down."),
        _words(
            "label",
            "What else happened in the training then, which may explain it: the learning rate "
            "restarts, the loss spikes, the gradient norm jumps (see `optimisation`), or the data "
            "change: the training loss departs from that on held-out text. Empty for nothing that "
            "is known.",
        ),
        _words(
            "checkpoints",
            "Files of weights that are kept for it, before, at and after its beginning, in the "
            "folder of the tables; see `checkpoint_bytes`.",
        ),
        _number("provisional", "1 while a transition is provisional, else 0."),
        _number("confirmed", "1 once one is confirmed, until another begins; else 0."),
        _number("began", "Step at which the change seemed to begin when it was said.", "steps"),
        _number("detected_at", "Step at which it was provisional first.", "steps"),
        Field(
            name="score",
            help="Of a change the evidence for it, as a deviate of normal noise; of what forms the "
            "share of its way that is gone.",
            stderr=False,
            null="the threshold; of changes, series without any pass it at the stated rate",
            fooled_by="A trend that bends within few measurements.",
        ),
        _number(
            "false_alarms",
            "Provisional changes to expect of 1,000 measurements of a run without any, all series "
            "together.",
        ),
        _number("searched", "Series that were followed."),
        *_FITTED,
    ),
    needs=(),
    lasting=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What is said of a series, to those who are to act on it.

    Attributes:
        event: what was said, and when.
        kind: `change`, `formation` or `break`; see the field of the table.
        detected_at: the step at which the change was provisional first.
        fitted: the transition as fitted to what was measured until then, where that is clear.
        n: measurements of the series until then.
        searched: how many series were followed.
        false_alarms: provisional transitions to expect of 1,000 measurements of a run without any.
        label: what else happened then, empty for nothing that is known.
        checkpoints: files of weights that were kept for it, in the order of their steps.
    """

    event: Event
    kind: Kind
    detected_at: float
    fitted: Transition | None
    n: int
    searched: int
    false_alarms: float
    label: str = ""
    checkpoints: tuple[str, ...] = ()

    def __str__(self) -> str:
        event = self.event
        said = {
            "provisional": f"{event.direction} since step {event.onset:,.0f}",
            "confirmed": f"{event.direction} since step {event.onset:,.0f}",
            "retracted": f"not {event.direction} since step {event.onset:,.0f} after all",
        }
        why = f" ({self.label})" if self.label else ""
        what = said[event.state] if self.kind == "change" else ""
        if self.kind == "break":
            return f"{event.series} broken at step {event.onset:,.0f}: {self.label}"
        return f"{event.series} {what}".rstrip() + f": {event.state} at step {event.step:,.0f}{why}"


def reading(notices: Sequence[Notice], moment: Moment) -> Reading:
    """The notices of one measurement as rows."""
    columns: dict[str, Any] = {
        "series": [notice.event.series for notice in notices],
        "state": [notice.event.state for notice in notices],
        "direction": [notice.event.direction for notice in notices],
        "kind": [notice.kind for notice in notices],
        "label": [notice.label for notice in notices],
        "provisional": [float(notice.event.state == "provisional") for notice in notices],
        "confirmed": [float(notice.event.state == "confirmed") for notice in notices],
        "began": [notice.event.onset for notice in notices],
        "detected_at": [notice.detected_at for notice in notices],
        "score": [notice.event.score for notice in notices],
        "score_null": [notice.event.threshold for notice in notices],
        "checkpoints": [" ".join(notice.checkpoints) for notice in notices],
        "false_alarms": [notice.false_alarms for notice in notices],
        "searched": [float(notice.searched) for notice in notices],
        "n": [notice.n for notice in notices],
        "validity": ["ok"] * len(notices),
    }
    for field in _FITTED:
        columns[field.name] = [_number_of(notice.fitted, field.name) for notice in notices]
    return Reading.build(SPEC, moment, columns)


def _number_of(fitted: Transition | None, name: str) -> float | None:
    """A number of a fit; None where it lies outside what was measured."""
    value = math.nan if fitted is None else float(getattr(fitted, name))
    return value if math.isfinite(value) else None
