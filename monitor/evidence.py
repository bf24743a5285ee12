"""What a probe may draw on at one measurement.

Shapes: `batch` sequences; `prediction` one position less than a stimulus has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from monitor.ablating import Ablation
from monitor.capture import Observation
from monitor.optimising import Training
from monitor.parts import Parts
from monitor.record import ProbeSpec
from monitor.walks import Sampled

Columns = Mapping[str, Any]
"""A probe's table as it computes it: by the name of a column its entries, one a row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What a probe may draw on; what its declaration does not ask for may be missing.

    `observations` are what the stimuli showed, by their names; `previous` and `first` those of
    earlier measurements of this attempt, as far as they are kept (empty at the first one); `parts`
    the model's; `tables` what the probes that came before said, by their names; `ablated` the
    losses with heads ablated, on each stimulus; `sampled` the random walks around the model's
    weights, or why there are none; `training` what training itself did (None: nobody watches it).
    """

    observations: Mapping[str, Observation]
    previous: Mapping[str, Observation] = field(default_factory=dict)
    first: Mapping[str, Observation] = field(default_factory=dict)
    parts: Parts | None = None
    tables: Mapping[str, Columns] = field(default_factory=dict)
    ablated: Mapping[Ablation, Mapping[str, Float[Tensor, "batch prediction"]]] = field(
        default_factory=dict
    )
    sampled: Sampled | str = "it was not sampled"
    training: Training | None = None

    def known_parts(self) -> Parts:
        """The parts; raises `ValueError` where the declaration did not ask for them."""
        if self.parts is None:
            raise ValueError("the parts of the model were not asked for: declare weights=True")
        return self.parts

    def collected(self, kind: str, stimulus: str = "concepts") -> tuple[Any, str]:
        """What was collected of a labelled stimulus, and `ok`; or None, and why it was not."""
        observation = self.observations.get(stimulus)
        if observation is None:
            return None, "there is nothing to look at: pass text= or concepts="
        if kind in observation.features:
            return observation.features[kind], "ok"
        return None, observation.reasons.get(kind, "it was not observed")


def unseen(spec: ProbeSpec, why: str, *, n: int = 0) -> dict[str, Any]:
    """The columns of a table whose only row says why there is nothing to tell."""
    columns: dict[str, Any] = dict.fromkeys(c for field in spec.fields for c in field.columns)
    places = {dim.name: ["" if dim.text else -1] for dim in spec.dims}
    return columns | places | {"n": [n], "validity": [why]}
