"""The picture of a circuit: which rows are drawn, that it says what they say and no more, what is
answered where there is nothing to draw, and all of it through the sinks and on the command line.
"""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import monitor
from monitor import picture
from monitor.claims import INDUCTION_CIRCUIT
from monitor.cli import app
from monitor.evidence import Evidence
from monitor.probes import circuit, heads
from monitor.record import Measurement, Moment, Reading
from monitor.sinks import ParquetSink, PrometheusSink
from tests.monitor.probes.tables import EVEN, INDUCTION, PREVIOUS, evidence
from tests.monitor.sinks.scraped import families

REPOSITORY = Path(__file__).parents[2]
HURTS = {"zero": 1.0, "mean": 0.8}
HEADS = {(0, 0): PREVIOUS, (0, 1): EVEN, (1, 0): INDUCTION, (1, 1): EVEN}
NO_HEADS = dict.fromkeys(HEADS, EVEN)
K_EDGE = {((0, 0), (1, 0)): 8.0}
CLAIMS = {
    "none": {"seen": {(0, 0): INDUCTION}},
    "pattern": {"seen": HEADS},
    "attribution": {"seen": HEADS, "edges": K_EDGE},
    INDUCTION_CIRCUIT: {
        "seen": HEADS,
        "edges": K_EDGE,
        "groups": [("induction", "1.0", HURTS), ("previous_token", "0.0", HURTS)],
    },
}


def measurement(step, *, run="r", hours=0, seen=HEADS, **options) -> Measurement:
    """Both tables at a step; `hours` after all others."""
    time = datetime(2024, 5, 6, tzinfo=UTC) + timedelta(seconds=step, hours=hours)
    when = Moment(run=run, attempt=1, step=step, tokens=None, time=time)
    given = evidence(seen, **options)
    told = heads.compute(given)
    drawn = circuit.compute(Evidence(observations={}, tables={**given.tables, "heads": told}))
    readings = (
        Reading.build(heads.SPEC, when, told),
        Reading.build(circuit.SPEC, when, drawn),
    )
    return Measurement(moment=when, readings=readings)


def record(root, *measurements) -> Path:
    for one in measurements:
        ParquetSink(root, one.moment.run).write(one)
    return root


def edges(tmp_path, claim=INDUCTION_CIRCUIT, **more):
    return picture.circuit_at(record(tmp_path, measurement(5, **CLAIMS[claim] | more)))


def words(path) -> list[str]:
    """The pieces of text in an SVG."""
    return [
        "".join(e.itertext()).strip() for e in ElementTree.parse(path).iter() if "text" in e.tag
    ]


# Which rows


def test_the_last_step_with_edges_of_the_run_measured_last(tmp_path):
    record(
        tmp_path,
        measurement(9, run="a-later", hours=2),
        measurement(99, run="z-earlier"),
        measurement(10, run="a-later", hours=2, seen=NO_HEADS),
        measurement(3, run="a-later", hours=2),
    )
    assert set(picture.circuit_at(tmp_path)["step"]) == {9}
    assert set(picture.circuit_at(tmp_path)["run"]) == {"a-later"}
    assert set(picture.circuit_at(tmp_path, "z-earlier")["step"]) == {99}
    assert set(picture.circuit_at(tmp_path, step=3)["step"]) == {3}


def test_what_there_is_not_is_answered_by_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        picture.circuit_at(tmp_path / "missing")
    record(tmp_path, *(measurement(step) for step in (4, 8)), measurement(9, seen=NO_HEADS))
    with pytest.raises(ValueError, match=r"unknown run in .*: 'x'; known: r"):
        picture.circuit_at(tmp_path, "x")
    with pytest.raises(ValueError, match="no edges at step 9; it has some at 2 steps from 4 to 8"):
        picture.circuit_at(tmp_path, step=9)
    record(tmp_path, *(measurement(step, run="even", seen=NO_HEADS) for step in (0, 1)))
    with pytest.raises(ValueError, match=r"no circuit at any of its 2 measurements \(no head att"):
        picture.circuit_at(tmp_path, "even")


def test_a_run_without_the_table(tmp_path):
    whole = measurement(1)
    record(tmp_path, Measurement(moment=whole.moment, readings=whole.readings[:1]))
    with pytest.raises(ValueError, match=r"no table 'circuit' in .*: expected the root= of a run"):
        picture.circuit_at(tmp_path)


# What it says


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_title_says_no_more_than_the_claim(tmp_path, claim):
    drawn = edges(tmp_path, claim)
    assert set(drawn["claim"]) == {claim}
    title, causal = picture.title(drawn), claim == INDUCTION_CIRCUIT
    assert title.startswith("Induction circuit") == causal
    assert ("hurts" in title) == causal
    said = picture.caption(drawn)
    assert ("raised the loss on later copies more than any random group" in said) == causal
    assert ("was not measured at this step" in said) != causal


def test_an_ablation_that_did_not_hurt_is_told(tmp_path):
    harmless = [("induction", "1.0", dict.fromkeys(HURTS, 0.0))]
    drawn = edges(tmp_path, "attribution", groups=harmless)
    assert "did not raise the loss" in picture.caption(drawn)


def test_every_number_is_drawn_with_its_null(tmp_path):
    path = picture.save(edges(tmp_path), tmp_path / "c.svg")
    text = words(path)
    assert {"0.0", "1.0", "layer 0", "layer 1", "0.20 (+8 sd)", "+3.00 ± 0.10"} <= set(text)
    assert "run r, step 5" in text
    assert {"previous-token head", "induction head", "logits of the next token"} <= set(text)
    whole = " ".join(text)
    assert "random matrices give 0.120, standard deviation 0.010" in whole
    assert "(null 0), ± its standard error over 16 sequences" in whole
    assert picture.title(edges(tmp_path)) in path.read_text()


def line_styles(rows) -> set[str]:
    axes = picture.draw(rows).axes[0]
    return {line.get_linestyle() for line in axes.lines}


def test_lines_tell_chance_and_what_was_not_measured(tmp_path):
    weak = {**HEADS, (1, 0): INDUCTION | {"contrast": 0.1}}
    assert line_styles(edges(tmp_path / "solid")) == {"-"}
    assert line_styles(edges(tmp_path / "dashed", seen=weak, edges={((0, 0), (1, 0)): 2.0})) == {
        "--"
    }
    missing = {"without": ("composition", "attribution"), "edges": {}, "groups": ()}
    drawn = edges(tmp_path / "dotted", **missing)
    assert line_styles(drawn) == {":"}
    assert "random matrices" not in picture.caption(drawn)


def test_stronger_edges_are_wider(tmp_path):
    seen = {
        (0, 0): PREVIOUS,
        (0, 1): PREVIOUS,
        (1, 0): INDUCTION,
        (1, 1): {**INDUCTION, "contrast": 1.0},
    }
    between = {((0, 0), (1, 0)): 16.0, ((0, 1), (1, 1)): 5.0}
    axes = picture.draw(edges(tmp_path, seen=seen, edges=between)).axes[0]
    widths = {line.get_color(): [] for line in axes.lines if line.get_linestyle() == "-"}
    for line in axes.lines:
        if line.get_linestyle() == "-":
            widths[line.get_color()].append(line.get_linewidth())
    for strong, faint in widths.values():
        assert strong > 1.5 * faint > 1.5


def test_chance_is_never_wide(tmp_path):
    weak = {**HEADS, (0, 1): PREVIOUS, (1, 1): {**INDUCTION, "contrast": 0.2}}
    axes = picture.draw(edges(tmp_path, seen=weak, edges={((0, 0), (1, 0)): 2.9})).axes[0]
    chance = [line.get_linewidth() for line in axes.lines if line.get_linestyle() != "-"]
    assert chance == [1.0] * 5


def numbers_between(rows) -> list[str]:
    texts = picture.draw(rows).axes[0].texts
    return sorted(text.get_text() for text in texts if "sd" in text.get_text())


def test_of_many_edges_the_strongest_to_each_head_have_their_numbers(tmp_path):
    inducing = {(1, head): INDUCTION for head in range(3)}
    between = {((0, a), (1, b)): 4.0 + (a + b) % 4 for a in range(4) for b in range(3)}
    few = {(0, head): PREVIOUS for head in range(2)} | inducing
    assert len(numbers_between(edges(tmp_path / "few", seen=few, edges=between))) == 6
    many = {(0, head): PREVIOUS for head in range(4)} | inducing
    drawn = edges(tmp_path / "many", seen=many, edges=between)
    assert numbers_between(drawn) == ["0.19 (+7 sd)"] * 3


def test_no_line_to_the_logits_passes_through_a_head(tmp_path):
    seen = {(layer, head): PREVIOUS for layer in (0, 1) for head in range(3)}
    seen |= {(layer, head): INDUCTION for layer in (2, 5) for head in range(3)}
    axes = picture.draw(edges(tmp_path, seen=seen, edges={})).axes[0]
    names = {f"{layer}.{head}" for layer, head in seen}
    columns = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert names <= set(columns)
    assert len({round(columns[name], 6) for name in names}) == 12


def test_of_many_heads_the_strongest_are_drawn_and_the_others_told(tmp_path):
    seen = {(0, head): PREVIOUS for head in range(9)}
    seen |= {(1, head): INDUCTION | {"contrast": 1.0 + head} for head in range(9)}
    between = {((0, head), (1, head)): 5.0 + head for head in range(9)}
    text = words(picture.save(edges(tmp_path, seen=seen, edges=between), tmp_path / "c.svg"))
    assert {"1.8", "1.3", "0.8", "0.3"} <= set(text)
    assert not {"1.2", "0.2"} & set(text)
    assert "Not drawn: 6 heads with weaker edges." in " ".join(text)


# Files


@pytest.mark.parametrize(
    ("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_kinds_of_files(tmp_path, suffix, magic):
    path = tmp_path / "in" / "a new folder" / f"c.{suffix}"
    assert picture.save(edges(tmp_path), path) == path
    assert path.read_bytes().startswith(magic)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    drawn = edges(tmp_path)
    once, again = (picture.save(drawn, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert once == again


def test_no_other_kind_of_file(tmp_path):
    with pytest.raises(ValueError, match=r"c\.jpeg.*known: \.svg, \.png, \.pdf"):
        picture.save(edges(tmp_path), tmp_path / "c.jpeg")
    assert not (tmp_path / "c.jpeg").exists()


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))
from monitor.cli import app
app(["circuit", "--root", sys.argv[1], "--output", sys.argv[1] + "/c.svg"])
"""


@pytest.mark.parametrize("missing", ["torch", "matplotlib"])
def test_it_needs_matplotlib_and_no_torch(tmp_path, missing):
    record(tmp_path, measurement(5))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT, str(tmp_path), missing],
        cwd=REPOSITORY, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode == 0) == (missing == "torch"), done.stderr
    assert (tmp_path / "c.svg").exists() == (missing == "torch")
    if missing == "matplotlib":
        assert done.stderr == (
            "phasewatch circuit: drawing takes matplotlib, which is not installed: "
            "pip install 'phasewatch[pictures]'\n"
        )


# The command


def command(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["circuit", *map(str, arguments)], env={"COLUMNS": "100"})
    return done.exit_code, done.output


def test_the_command_draws_and_says_what_is_shown(tmp_path):
    record(tmp_path, *(measurement(step, **CLAIMS[INDUCTION_CIRCUIT]) for step in (4, 8)))
    output = tmp_path / "c.svg"
    code, said = command("--root", tmp_path, "--run", "r", "--step", 4, "--output", output)
    assert code == 0, said
    assert said.startswith(f"{output}: Induction circuit: ablating its induction heads hurts")
    assert "random matrices give 0.120" in said
    assert "run r, step 4" in words(output)


def test_by_default_it_draws_the_runs_of_this_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "runs", measurement(4))
    assert command()[0] == 0
    assert "run r, step 4" in words(tmp_path / "circuit.svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--root", "missing"), "no folder missing"),
        (("--run", "x"), "known: r"),
        (("--step", "7"), "the nearest 4"),
        (("--output", "c.txt"), "known: .svg, .png, .pdf"),
    ],
)
def test_the_command_says_what_to_do(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "runs", measurement(4))
    code, said = command(*arguments)
    assert code == 1
    assert said.startswith("phasewatch circuit: ")
    assert message in said
    assert "Traceback" not in said


# A measurement without a circuit, in the sinks


def test_a_step_without_a_circuit_is_stored_and_read(tmp_path):
    record(tmp_path, measurement(1, seen=NO_HEADS), measurement(2))
    table = monitor.read(tmp_path, "circuit")
    assert table["step"].tolist() == [1, 2, 2]
    assert table["kind"].tolist() == ["none", "k", "logits"]
    assert table["validity"][0] == "no head attends as in an induction circuit"
    with monitor.connect(tmp_path) as sql:
        query = "SELECT step, max(contrast) FROM circuit GROUP BY step ORDER BY step"
        assert sql.execute(query).fetchall() == [(1, None), (2, 3.0)]


def test_metrics_of_circuits_that_come_and_go():
    sink = PrometheusSink("r", port=0)
    try:
        for step, seen in enumerate([NO_HEADS, HEADS, NO_HEADS, HEADS]):
            sink.write(measurement(step, seen=seen, edges=K_EDGE))
            found = families(sink)
            shown = found["phasewatch_circuit_contrast_logits"].samples
            (hidden,) = found["phasewatch_circuit_not_interpretable"].samples
            assert (len(shown), hidden.value) == ((1, 0) if seen is HEADS else (0, 1))
        (sample,) = shown
        assert sample.value == 3.0
        assert sample.labels["kind"] == "logits"
        assert (sample.labels["source_layer"], sample.labels["target_layer"]) == ("1", "-1")
    finally:
        sink.close()
