"""The probes: one file, one declaration, one pure function and one table each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from monitor.ablating import Stage
from monitor.evidence import Evidence
from monitor.names import expect_one_of
from monitor.probes import (
    ablation,
    analogies,
    attribution,
    circuit,
    composition,
    concepts,
    copying,
    dictionary,
    directions,
    geometry,
    grokking,
    heads,
    in_context,
    induction,
    learning_coefficient,
    logit_lens,
    neurons,
    optimisation,
    parameters,
    residual,
    sparse_probing,
    superposition,
    top_neurons,
)
from monitor.record import ProbeSpec
from monitor.walks import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A declaration, and the function from what was seen to its table's columns.

    A probe that declares `interventions` also has a `plan`: the stages of ablations that it wants,
    the most telling first; or says what `walks` around the weights it wants.
    """

    spec: ProbeSpec
    compute: Callable[[Evidence], dict[str, Any]]
    plan: Callable[[Evidence], tuple[Stage, ...]] | None = None
    walks: Options | None = None

    @property
    def together(self) -> bool:
        """Whether it has the model run, which all processes do together."""
        return self.plan is not None or self.walks is not None


# What a probe reads of others comes before it.
PROBES = (
    Probe(spec=induction.SPEC, compute=induction.compute),
    Probe(spec=in_context.SPEC, compute=in_context.compute),
    Probe(spec=logit_lens.SPEC, compute=logit_lens.compute),
    Probe(spec=residual.SPEC, compute=residual.compute),
    Probe(spec=sparse_probing.SPEC, compute=sparse_probing.compute),
    Probe(spec=copying.SPEC, compute=copying.compute),
    Probe(spec=composition.SPEC, compute=composition.compute),
    Probe(spec=attribution.SPEC, compute=attribution.compute),
    Probe(spec=ablation.SPEC, compute=ablation.compute, plan=ablation.plan),
    Probe(spec=heads.SPEC, compute=heads.compute),
    Probe(spec=circuit.SPEC, compute=circuit.compute),
    Probe(spec=concepts.SPEC, compute=concepts.compute),
    Probe(spec=directions.SPEC, compute=directions.compute),
    Probe(spec=geometry.SPEC, compute=geometry.compute),
    Probe(spec=analogies.SPEC, compute=analogies.compute),
    Probe(spec=superposition.SPEC, compute=superposition.compute),
    Probe(spec=neurons.SPEC, compute=neurons.compute),
    Probe(spec=top_neurons.SPEC, compute=top_neurons.compute),
    Probe(spec=grokking.SPEC, compute=grokking.compute),
    Probe(spec=parameters.SPEC, compute=parameters.compute),
    Probe(spec=optimisation.SPEC, compute=optimisation.compute),
)

# What takes so much longer than all else that it is measured only where it is named.
OPTIONAL = (
    Probe(spec=dictionary.SPEC, compute=dictionary.compute),
    Probe(
        spec=learning_coefficient.SPEC,
        compute=learning_coefficient.compute,
        walks=learning_coefficient.WALKS,
    ),
)


def select(names: Sequence[str] | None) -> tuple[Probe, ...]:
    """The probes of these names, all of `PROBES` for None or the name `default`, which adds them to
    others: `["default", "dictionary"]`. `induction.entropy` asks for one field.

    Raises `ValueError` for an unknown probe or field, naming the known ones, and for no probe.
    """
    if names is None:
        return PROBES
    if isinstance(names, str) or not names:
        raise ValueError(
            f"probes: expected a list of names such as {[p.spec.name for p in PROBES]}, "
            f"got {names!r}"
        )
    known = {probe.spec.name: probe for probe in (*PROBES, *OPTIONAL)}
    default = [probe.spec.name for probe in PROBES]
    fields: dict[str, list[str]] = {}
    for name in [n for given in names for n in (default if given == "default" else [given])]:
        probe, _, field = name.partition(".")
        expect_one_of("probe", probe, [*known, "default"])
        fields.setdefault(probe, [])
        fields[probe] += [field] if field else [f.name for f in known[probe].spec.fields]
    return tuple(
        dataclasses.replace(known[name], spec=known[name].spec.only(wanted))
        for name, wanted in fields.items()
    )


def with_read(probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """The probes, and before each those whose tables it reads."""
    known = {probe.spec.name: probe for probe in (*PROBES, *OPTIONAL, *probes)}
    ordered: dict[str, Probe] = {}

    def add(probe: Probe) -> None:
        for name in probe.spec.reads:
            add(known[name])
        ordered.setdefault(probe.spec.name, probe)

    for probe in probes:
        add(probe)
    return tuple(ordered.values())
