"""The probes: one file, one declaration, one pure function and one table each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitor.capture import Observation
from monitor.probes import in_context, induction
from monitor.record import ProbeSpec, expect_one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A declaration, and the function from observations (by stimulus) to its table's columns."""

    spec: ProbeSpec
    compute: Callable[[Mapping[str, Observation]], dict[str, Any]]


PROBES = (
    Probe(spec=induction.SPEC, compute=induction.compute),
    Probe(spec=in_context.SPEC, compute=in_context.compute),
)


def select(names: Sequence[str] | None) -> tuple[Probe, ...]:
    """The probes of these names, all of them for None. `induction.entropy` asks for one field.

    Raises `ValueError` for an unknown probe or field, naming the known ones, and for no probe.
    """
    if names is None:
        return PROBES
    if isinstance(names, str) or not names:
        raise ValueError(
            f"probes: expected a list of names such as {[p.spec.name for p in PROBES]}, "
            f"got {names!r}"
        )
    known = {probe.spec.name: probe for probe in PROBES}
    fields: dict[str, list[str]] = {}
    for name in names:
        probe, _, field = name.partition(".")
        expect_one_of("probe", probe, list(known))
        fields.setdefault(probe, [])
        fields[probe] += [field] if field else [f.name for f in known[probe].spec.fields]
    return tuple(
        Probe(spec=known[name].spec.only(wanted), compute=known[name].compute)
        for name, wanted in fields.items()
    )
