"""Writes docs/tables.md from the probes' declarations: `make docs`."""

from __future__ import annotations

from pathlib import Path

from monitor.detection import SPEC as TRANSITIONS
from monitor.probes import OPTIONAL, PROBES
from monitor.record import Field, ProbeSpec

PAGE = Path(__file__).with_name("tables.md")

_INTRODUCTION = """\
# Tables and metrics

Generated from the probes' declarations by `make docs`.

Every table has the columns `run` (from the folder's name), `step`, `tokens`, `time` and `attempt`,
then the dimensions, then for each field the value, `<field>_stderr` (its standard error over
sequences), `<field>_null` (what it would be without structure) and, for what is computed from
weights and not from a sample, `<field>_null_sd` (how far the null scatters), then `n` (the number
of independent sequences) and `validity` (`ok`, or why the row cannot be interpreted). Every column
of a field is also a metric, named as below, except for those that are lists or words.
"""

_RECORDS = """\
## Records beside the probes

- `attempts`: a row for each start of a run: `attempt`, `started`, `resumed_from` (the step of the
  checkpoint), `seed`, `parameters` (their number), `host`, `revision` (of the code in the working
  folder), `versions` and `config` (JSON); and what measuring cost: `measurements` (how many),
  `measured_seconds` (what they took, sinks included) and `elapsed_seconds` (since the attempt
  began), so that `measured_seconds / elapsed_seconds` is its share of the time. With several
  processes these are the first one's. They are brought up to date with a measurement, at most every
  ten seconds, and at the end; `ended` is when that was, and missing while the attempt goes on or
  where it was cut off.
- `stimuli`: a row for each sequence on which is measured: `stimulus`, `sequence`, `period` (-1: not
  repeated) and `token_ids`; of labelled sequences `split` (0 and 1: what is fitted is fitted on
  these two halves; 2: held out from that), `length` (how many tokens are no padding), `source`
  (sequences with the same one are alike, windows of one file say) and `labels` (by concept 1, -1 or
  0 for each token: it has it, has it not, does not count). Of a task's questions 0 is trained on,
  `answer` labels the tokens of the answer, and other names say the rest.
- `failures`: a row for each probe or sink that raised: `step`, `tokens`, `time`, `attempt`, `part`,
  `error` and `traceback`.

| metric | what it is |
|---|---|
| `phasewatch_run_info` | 1, with the run, the attempt and the model in its labels |
| `phasewatch_step`, `phasewatch_tokens` | where training was at the latest measurement |
| `phasewatch_last_measurement_timestamp_seconds` | when that was |
| `phasewatch_probe_duration_seconds` | what each probe cost, by `probe` |
| `phasewatch_failures_total` | what raised, by `part` |
| `phasewatch_series_dropped_total` | series left out of the metrics for the series budget |
| `phasewatch_<table>_not_interpretable` | rows whose `validity` is not `ok` |
| `phasewatch_<table>_<field>_layer_max`, `…_layer_mean` | over the heads of each layer |
"""


def page() -> str:
    """The whole page."""
    return "\n".join(
        [
            _INTRODUCTION,
            *(_table(probe.spec) for probe in (*PROBES, *OPTIONAL)),
            _table(TRANSITIONS),
            _RECORDS,
        ]
    )


def _table(spec: ProbeSpec) -> str:
    dims = ", ".join(f"`{dim.name}`" for dim in spec.dims) or "none: one row a measurement"
    lines = [
        f"## `{spec.name}`",
        "",
        f"{spec.help} Source: {spec.source}. Dimensions: {dims}.",
        "",
        "| field | metric | what it is | null | what fools it |",
        "|---|---|---|---|---|",
        *(_row(spec, field) for field in spec.fields),
        "",
    ]
    return "\n".join(lines)


def _row(spec: ProbeSpec, field: Field) -> str:
    unit = f" ({field.unit})" if field.unit else ""
    metric = f"`{spec.metric(field.name)}`" if field.is_number else "none"
    cells = (f"`{field.name}`", metric, field.help + unit, field.null or "none", field.fooled_by)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
