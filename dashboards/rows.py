"""Rows of panels: of each table those of its numbers, by time and along the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dashboards import panels, queries
from dashboards.panels import Built
from monitor.detection import SPEC as TRANSITIONS
from monitor.probes import OPTIONAL, PROBES
from monitor.record import ProbeSpec

SPECS = {spec.name: spec for spec in (*(p.spec for p in (*PROBES, *OPTIONAL)), TRANSITIONS)}

# A new probe is shown once it has a line here; a test misses it until then.
SHOWN_ON = {
    "induction": "induction",
    "in_context": "induction",
    "logit_lens": "features",
    "residual": "features",
    "sparse_probing": "features",
    "copying": "heads",
    "composition": "induction",
    "attribution": "heads",
    "ablation": "induction",
    "heads": "heads",
    "circuit": "induction",
    "concepts": "features",
    "directions": "features",
    "geometry": "features",
    "analogies": "features",
    "superposition": "features",
    "neurons": "features",
    "top_neurons": "features",
    "grokking": "transitions",
    "parameters": "transitions",
    "optimisation": "overview",
    "dictionary": "features",
    "learning_coefficient": "transitions",
    "transitions": "transitions",
}

THIRD = (8, 8)


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one heading, each with its width and height."""

    title: str
    sized: Sequence[tuple[Built, tuple[int, int]]]
    closed: bool = True

    @property
    def panels(self) -> list[Built]:
        """The panels from left to right."""
        return [panel for panel, _ in self.sized]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Of each panel its width, of 24 columns, and its height."""
        return [size for _, size in self.sized]


def of_tables(board: str) -> Iterator[Row]:
    """A row for each table that is shown on a dashboard."""
    for name, spec in SPECS.items():
        if SHOWN_ON.get(name) == board:
            yield _of_table(spec)


def _of_table(spec: ProbeSpec) -> Row:
    numbers = [field for field in spec.fields if field.is_number]
    sized: list[tuple[Built, tuple[int, int]]] = [(panels.not_interpretable(spec), (6, 8))]
    if any(field.null for field in numbers):
        sized.append((panels.beyond_null(spec), (18, 8)))
    if [dim.name for dim in spec.dims] == ["layer", "head"]:
        sized += [(panels.layers(spec, field), THIRD) for field in numbers]
    sized += [(panels.over_time(spec, field), THIRD) for field in numbers]
    title = spec.name.replace("_", " ").capitalize()
    return Row(f"{title}: {spec.source}", sized)


def by_step(*names: str) -> Row:
    """Fields of tables without dimensions along the steps, as scraped."""
    chosen = [name.split(".") for name in names]
    made = [panels.trend(SPECS[table], SPECS[table].field(field)) for table, field in chosen]
    return Row("By step, as scraped", [(panel, THIRD) for panel in made], closed=False)


def stored_by_layer(*names: str) -> Row:
    """Fields of tables of layers along the steps, as stored."""
    sized = []
    for table, field in (name.split(".") for name in names):
        spec = SPECS[table]
        asked = queries.series(table, field, by="layer", runs=["$run"])
        title = f"{field.replace('_', ' ')} of {table.replace('_', ' ')}, by step"
        made = panels.stored(title, spec, spec.field(field), asked, "layer")
        sized.append((made, THIRD))
    return Row("By step, as stored", sized, closed=False)
