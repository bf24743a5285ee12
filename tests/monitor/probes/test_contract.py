"""What every probe in PROBES promises, whatever it measures: one that is added is tested too."""

import ast
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import monitor.record
from monitor.anatomy import find_language_model
from monitor.probes import PROBES, Probe, select
from monitor.record import METADATA_KEY, MOMENT, Dim, Field, Moment, ProbeSpec, Reading, dims_of
from monitor.subject import StimulusOptions, Subject
from tests import models
from tests.conftest import SHAPED
from tests.models import AttentionOnly

MODELS = {"attention_only": AttentionOnly, **models.HUGGING_FACE}
WHEN = Moment(run="r", attempt=1, step=3, tokens=None, time=datetime(2024, 5, 1, tzinfo=UTC))

each_probe = pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.spec.name)
each_model = pytest.mark.parametrize("kind", MODELS)


def read(probe: Probe, kind: str, *, with_text: bool = True) -> Reading:
    torch.manual_seed(0)
    module = MODELS[kind]()
    model = find_language_model(module)
    text = torch.randint(model.vocab_size, (6, 64)) if with_text else None
    options = StimulusOptions(text=text, context=64, sequences=6)
    measurement = Subject.new(module, model, [probe], options).measure([probe], WHEN)
    assert measurement.failures == ()
    return measurement.readings[0]


@each_probe
def test_columns_are_those_declared(probe):
    seen = {}

    def remember(evidence):
        seen.update(probe.compute(evidence))
        return seen

    reading = read(replace(probe, compute=remember), "attention_only")
    dims = [dim.name for dim in probe.spec.dims]
    declared = [column for field in probe.spec.fields for column in field.columns]
    assert set(seen) == {*dims, *declared, "n", "validity"}
    assert reading.table.column_names == [*MOMENT, *dims, *declared, "n", "validity"]


@each_probe
@each_model
def test_values_are_finite_and_in_range(probe, kind):
    table = read(probe, kind).table
    assert table.num_rows > 0
    assert set(table["validity"].to_pylist()) == {"ok"}
    assert set(table["n"].to_pylist()) == {6}
    for field in probe.spec.fields:
        for column in field.columns:
            values = table[column]
            assert values.null_count == 0, column
            flat = np.concatenate(values.to_pylist()) if field.per_position else values.to_numpy()
            assert np.isfinite(flat).all(), column
            if column == f"{field.name}_stderr":
                assert (flat >= 0).all()
            else:
                slack = 1e-5
                assert field.low is None or flat.min() >= field.low - slack, column
                assert field.high is None or flat.max() <= field.high + slack, column


@each_probe
@each_model
def test_rows_are_distinct_and_complete(probe, kind):
    table = read(probe, kind).table
    rows = list(zip(*(table[dim.name].to_pylist() for dim in probe.spec.dims), strict=True))
    if probe.spec.dims:
        assert len(set(rows)) == len(rows)
        assert min(min(row) for row in rows) == 0
    else:
        assert table.num_rows == 1


@each_probe
def test_without_text_columns_are_missing_and_never_left_out(probe):
    with_text, without = (read(probe, "gpt2", with_text=on).table for on in (True, False))
    assert without.schema.equals(with_text.schema, check_metadata=True)
    assert without.num_rows == with_text.num_rows


@each_probe
def test_it_can_be_said_twice(probe):
    assert read(probe, "gpt2").table.equals(read(probe, "gpt2").table)


@each_probe
def test_a_table_survives_parquet_with_its_declaration(probe):
    table = read(probe, "gpt2").table
    file = io.BytesIO()
    pq.write_table(table, file)
    back = pq.read_table(file)
    assert back.equals(table)
    assert back.schema.metadata[METADATA_KEY] == probe.spec.schema.metadata[METADATA_KEY]
    assert dims_of(back.schema) == [dim.name for dim in probe.spec.dims]
    declared = json.loads(back.schema.metadata[METADATA_KEY])
    assert declared["table"] == probe.spec.name
    assert declared["format"] == monitor.record.FORMAT
    again = declared["probe"]
    rebuilt = ProbeSpec(
        **{
            **again,
            "dims": tuple(Dim(**dim) for dim in again["dims"]),
            "fields": tuple(Field(**field) for field in again["fields"]),
            "needs": tuple(map(tuple, again["needs"])),
            "reads": tuple(again["reads"]),
        }
    )
    assert rebuilt == probe.spec
    assert rebuilt.schema.equals(probe.spec.schema, check_metadata=True)


@each_probe
def test_types_of_columns(probe):
    schema = probe.spec.schema
    for field in probe.spec.fields:
        for column in field.columns:
            assert schema.field(column).type == field.type


@each_probe
def test_everything_is_explained(probe):
    assert probe.spec.help.endswith(".")
    assert len(probe.spec.source) > 10
    assert probe.spec.needs or probe.spec.weights or probe.spec.reads
    for dim in probe.spec.dims:
        assert dim.help.endswith(".")
    for field in probe.spec.fields:
        assert field.help.endswith("."), field.name
        if field.is_number:
            assert field.null, f"{field.name} does not say what it would be without structure"
            assert field.fooled_by.endswith("."), f"{field.name} does not say what fools it"
            uncertain = field.stderr or field.null_sd
            assert uncertain, f"{field.name} is published without its uncertainty"


@each_probe
def test_any_single_field_can_be_asked_for(probe):
    for field in probe.spec.fields:
        (only,) = select([f"{probe.spec.name}.{field.name}"])
        assert [f.name for f in only.spec.fields] == [field.name]
        table = read(only, "attention_only").table
        assert set(field.columns) <= set(table.column_names)
        assert table["validity"].to_pylist() == ["ok"] * table.num_rows


def test_names_are_distinct():
    names = [probe.spec.name for probe in PROBES]
    assert len(set(names)) == len(names)


def test_select():
    assert select(None) == PROBES
    assert [p.spec.name for p in select(["in_context", "induction"])] == ["in_context", "induction"]
    (both,) = select(["induction.entropy", "induction.prefix_matching"])
    assert [field.name for field in both.spec.fields] == ["prefix_matching", "entropy"]
    (whole,) = select(["induction.entropy", "induction"])
    assert whole.spec == next(p.spec for p in PROBES if p.spec.name == "induction")


PACKAGE = Path(monitor.record.__file__).parent


def shaped_modules() -> list[str]:
    """Modules of `monitor` that annotate shapes and take no arguments from users."""
    from_users = {"anatomy"}
    paths = sorted(PACKAGE.rglob("*.py"))
    names = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}
    return [
        n for n, p in names.items() if "from jaxtyping" in p.read_text() and n not in from_users
    ]


@pytest.mark.parametrize("name", shaped_modules())
def test_shapes_are_checked_while_testing(name):
    listed = any(name == shaped or name.startswith(f"{shaped}.") for shaped in SHAPED)
    assert listed, f"SHAPED in tests/conftest.py leaves out monitor.{name}"


@pytest.mark.parametrize("name", shaped_modules())
def test_shapes_are_written_as_strings(name):
    """Without its quotes a shape is arithmetic, and then silently checked by nobody."""
    source = (PACKAGE / f"{name.replace('.', '/')}.py").read_text()
    kinds = {"Float", "Int", "Num", "Bool", "Shaped"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) in kinds:
            shape = node.slice.elts[1]
            assert isinstance(shape, ast.Constant), f"line {node.lineno}: {ast.unparse(node)}"
