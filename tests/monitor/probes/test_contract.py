"""What every probe in PROBES promises, whatever it measures: one that is added is tested too."""

import ast
import functools
import io
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import monitor.record
from monitor.anatomy import find_language_model
from monitor.batches import StimulusOptions
from monitor.optimising import Training, Update
from monitor.probes import OPTIONAL, PROBES, Probe, select
from monitor.record import METADATA_KEY, MOMENT, Dim, Field, Moment, ProbeSpec, Reading, dims_of
from monitor.subject import Subject
from monitor.tasks import ModularAddition
from tests import models
from tests.conftest import SHAPED
from tests.models import AttentionOnly
from tests.models.concepts import CONCEPTS, RELATION

MODELS = {"attention_only": AttentionOnly, **models.HUGGING_FACE}
WHEN = Moment(run="r", attempt=1, step=3, tokens=None, time=datetime(2024, 5, 1, tzinfo=UTC))

each_probe = pytest.mark.parametrize(
    "probe", [*PROBES, *OPTIONAL], ids=lambda probe: probe.spec.name
)
each_model = pytest.mark.parametrize("kind", MODELS)


# What cannot be interpreted of models with random weights: there is nothing of the kind in them.
NOTHING_THERE = {
    "neurons": {"no neurons: it adds nothing of an mlp's to its stream"},
    "top_neurons": {"no neurons: it adds nothing of an mlp's to its stream"},
    "ablation": {"no head shows prefix matching"},
    "circuit": {"no head attends as in an induction circuit"},
    "sparse_probing": {"no neurons: it adds nothing of an mlp's to its stream"},
    "learning_coefficient": {"negative: the weights are no minimum of the loss on this text"},
}
# Columns that may lack entries in an ok row: there is no earlier measurement, no test was made, an
# edge is of another kind, a layer has no MLP, or has activations below 0; a task names no keys.
MAY_LACK = {
    "concepts": ("drift_previous", "drift_first"),
    "geometry": ("cosine_disattenuated", "label_overlap"),
    "neurons": ("class_selectivity",),
    # What is of all parameters alone, or of several batches; and vectors have no rank.
    "optimisation": (
        "loss",
        "steps_per_second",
        "tokens_per_second",
        "stable_rank",
        "noise_scale",
        "gradient_signal",
        "gradient_variance",
        "noise_scale_why",
    ),
    # Also where zeros in the stream's place cost nothing, as of weights that are not trained.
    "dictionary": ("loss_recovered", "decoder_cosine", "births", "deaths"),
    "residual": ("cka_previous", "cka_first"),
    "heads": ("key_composition", "over_random"),
    "circuit": ("key_composition", "contrast"),
    "grokking": ("restricted_loss_named", "excluded_loss_named"),
    "superposition": ("readable_before", "readable_after", "computed", "carried_by"),
}


def labelled(probe: Probe) -> bool:
    """Whether it looks at labelled text, of which there are other sequences."""
    return any(stimulus in {"concepts", "analogies", "task"} for stimulus, _ in probe.spec.needs)


def valid(probe: Probe, table: pa.Table) -> pa.Table:
    """The rows that are ok; all others say what is not there."""
    reasons = set(table["validity"].to_pylist()) - {"ok"}
    assert reasons <= NOTHING_THERE.get(probe.spec.name, set())
    return table.filter(pc.equal(table["validity"], "ok"))


@functools.cache
def read(probe: Probe, kind: str, *, with_text: bool = True) -> Reading:
    torch.manual_seed(0)
    module = MODELS[kind]()
    model = find_language_model(module)
    text = torch.randint(model.vocab_size, (12, 64)) if with_text else None
    concepts = (*CONCEPTS, RELATION) if with_text else None
    pairs = [(a, b) for a in range(7) for b in range(a, 7)]
    task = ModularAddition(7, train=pairs) if with_text else None
    options = StimulusOptions(text=text, concepts=concepts, task=task, context=64, sequences=6)
    updates = {p: Update(gradient=2.0, change=0.5, learning_rate=0.1) for p in module.parameters()}
    training = Training(
        loss=3.0, updates=updates, why="ok", steps_per_second=2.0, tokens_per_second=8.0
    )
    measurement = Subject.new(module, model, [probe], options).measure(
        [probe], WHEN, training=training
    )
    assert measurement.failures == ()
    return measurement.readings[0]


@functools.cache
def columns_of(probe: Probe) -> dict:
    """What a probe computes."""
    seen = {}

    def remember(evidence):
        seen.update(probe.compute(evidence))
        return seen

    read.__wrapped__(replace(probe, compute=remember), "attention_only")
    return seen


@each_probe
def test_columns_are_those_declared(probe):
    dims = [dim.name for dim in probe.spec.dims]
    declared = [column for field in probe.spec.fields for column in field.columns]
    assert set(columns_of(probe)) == {*dims, *declared, "n", "validity"}
    table = read(probe, "attention_only").table
    assert table.column_names == [*MOMENT, *dims, *declared, "n", "validity"]


@each_probe
@each_model
def test_values_are_finite_and_in_range(probe, kind):
    table = read(probe, kind).table
    assert table.num_rows > 0
    # Weights are no sample of sequences.
    assert probe.spec.weights or labelled(probe) or set(table["n"].to_pylist()) == {6}
    assert pc.min(table["n"]).as_py() > 1 or probe.spec.training
    table = valid(probe, table)
    for field in probe.spec.fields:
        for column in field.columns if table.num_rows else ():
            values = table[column]
            lacking = field.name in MAY_LACK.get(probe.spec.name, ())
            if field.text:
                assert lacking or column == "ablated_with" or values.null_count == 0, column
                continue
            assert lacking or values.null_count == 0, column
            values = values.drop_null()
            flat = np.concatenate(values.to_pylist()) if field.per else values.to_numpy()
            assert np.isfinite(flat).all(), column
            if column.endswith(("_stderr", "_null_sd")):
                assert (flat >= 0).all()
            elif len(flat):
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
        # What has no layer, or no head, says -1.
        numbers = [place for row in rows for place in row if not isinstance(place, str)]
        assert min(numbers, default=0) in {-1, 0}
    else:
        assert table.num_rows == 1


@each_probe
def test_without_text_columns_are_missing_and_never_left_out(probe):
    with_text, without = (read(probe, "gpt2", with_text=on).table for on in (True, False))
    assert without.schema.equals(with_text.schema, check_metadata=True)
    if labelled(probe):
        (why,) = without["validity"].to_pylist()
        assert re.search(r"pass (text= or concepts=|Analogies\(\.\.\.\) in concepts=|task=)$", why)
    else:
        assert without.num_rows == with_text.num_rows


@each_probe
def test_it_can_be_said_twice(probe):
    assert read(probe, "gpt2").table.equals(read.__wrapped__(probe, "gpt2").table)


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
            assert field.fooled_by.endswith("."), f"{field.name} does not say what fools it"
            if probe.spec.training and not field.null_sd:
                # What a step of training did is a fact, and no estimate.
                continue
            assert field.null, f"{field.name} does not say what it would be without structure"
            uncertain = field.stderr or field.null_sd
            assert uncertain, f"{field.name} is published without its uncertainty"


@each_probe
def test_any_single_field_can_be_asked_for(probe):
    for field in probe.spec.fields:
        (only,) = select([f"{probe.spec.name}.{field.name}"])
        assert [f.name for f in only.spec.fields] == [field.name]
        table = Reading.build(only.spec, WHEN, columns_of(probe)).table
        assert set(field.columns) <= set(table.column_names)
        valid(probe, table)


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
    from_users = {"analogies", "anatomy", "concepts.naming", "tasks", "transitions.offline"}
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
