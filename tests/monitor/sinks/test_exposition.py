"""The text of a page against prometheus_client's own, for texts and numbers of every kind: both
formats, read back by its parsers and compared line by line.
"""

import itertools
import math
import random

import numpy as np
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import pyarrow as pa
import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from monitor.record import Dim, Field, ProbeSpec
from monitor.sinks.exposition import Page, TableRows

FORMATS = {
    "": prometheus_client.parser.text_string_to_metric_families,
    "application/openmetrics-text; version=1.0.0": (
        prometheus_client.openmetrics.parser.text_string_to_metric_families
    ),
}

# What means something in one of the formats, in a heading, or to whoever splits text into lines.
PIECES = [*'\\"\n\r\t {}=,#a0é中😀', "\u2028", "\x0b", "\x00", "\\n", "# EOF\n", "NaN", "+Inf"]
HEADING = "\n# TYPE phasewatch_odd_score gauge\n"


def odd_text(chance: random.Random) -> str:
    return "".join(chance.choices([*PIECES, HEADING], k=chance.randrange(8)))


def odd_number(chance: random.Random) -> float:
    """Any 32-bit float; one in four is none, or is not finite."""
    if chance.random() < 0.25:
        return chance.choice([math.nan, math.inf, -math.inf])
    return float(np.uint32(chance.getrandbits(32)).view(np.float32))


def table(labels: list[tuple[str, str]], scores: list[float], help_text: str) -> TableRows:
    spec = ProbeSpec(
        name="odd",
        help="h",
        source="s",
        dims=(Dim(name="series", help="h"), Dim(name="alpha", help="h")),
        fields=(Field(name="score", help=help_text, stderr=False),),
        needs=(),
    )
    columns = {
        "series": pa.array([first for first, _ in labels], pa.string()),
        "alpha": pa.array([second for _, second in labels], pa.string()),
        "score": pa.array(scores, pa.float32()),
    }
    rows = pa.table(columns)
    return TableRows(spec=spec, valid=rows, shown=rows, invalid=2)


class Expected:
    """The same page, every row of it by prometheus_client."""

    def __init__(self, run, labels, scores, help_text, others):
        invalid = GaugeMetricFamily(
            "phasewatch_odd_not_interpretable",
            "Rows of the latest measurement whose validity is not ok; they are not exposed.",
            labels=["run"],
        )
        invalid.add_metric([run], 2)
        score = GaugeMetricFamily(
            "phasewatch_odd_score", f"{help_text} s.", labels=["run", "series", "alpha"]
        )
        for where, value in zip(labels, scores, strict=True):
            if math.isfinite(value):
                score.add_metric([run, *where], value)
        self.metrics = [invalid, score, *others]

    def collect(self):
        return self.metrics


def without_values(text: str) -> list[str]:
    """The lines without the number after a row's labels, which may be written otherwise."""
    lines = text.split("\n")
    return [line if line.startswith("#") else line.rpartition(" ")[0] for line in lines]


def samples(text: str, accept: str) -> list:
    families = FORMATS[accept](text)
    return [(s.name, s.labels, s.value) for family in families for s in family.samples]


@pytest.mark.parametrize("accept", FORMATS)
@pytest.mark.parametrize("seed", range(40))
def test_a_page_is_as_prometheus_client_writes_it(accept, seed):
    chance = random.Random(seed)
    run, help_text = odd_text(chance), odd_text(chance)
    labels = [(odd_text(chance), f"{odd_text(chance)}{row}") for row in range(chance.randrange(9))]
    scores = [odd_number(chance) for _ in labels]
    counter = CounterMetricFamily("phasewatch_failures", help_text, labels=["run", "part"])
    counter.add_metric([run, odd_text(chance)], 3)

    encode, kind = choose_encoder(accept)
    expected = encode(Expected(run, labels, scores, help_text, [counter])).decode()
    page = Page(run, [table(labels, scores, help_text)], [counter])
    text, content_type = page.text(accept)

    assert content_type == kind
    assert without_values(text.decode()) == without_values(expected)
    assert samples(text.decode(), accept) == samples(expected, accept)


@pytest.mark.parametrize("accept", FORMATS)
def test_every_number_is_read_back_as_it_was(accept):
    bits = np.random.default_rng(0).integers(0, 2**32, size=5_000, dtype=np.uint32)
    edges = [0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4028235e38, 1e5, 1e6, 1e7, 1e15, 1e16, 1e21, 1e22]
    scores = np.concatenate([bits.view(np.float32), np.array(edges, np.float32)])
    labels = [(str(row), "") for row in range(len(scores))]
    text, _ = Page("r", [table(labels, scores.tolist(), "h")], []).text(accept)
    read = {labels["series"]: value for name, labels, value in samples(text.decode(), accept)[1:]}
    finite = np.isfinite(scores)
    assert list(read) == np.flatnonzero(finite).astype(str).tolist()
    assert list(read.values()) == scores[finite].astype(float).tolist()


@pytest.mark.parametrize("accept", FORMATS)
def test_a_table_in_pieces_and_one_without_rows(accept):
    labels, scores = [("a", "b"), ("c", "d"), ("e", "f")], [1.0, 2.0, 3.0]
    whole = table(labels, scores, "h")
    pieces = pa.concat_tables([whole.shown.slice(0, 1), whole.shown.slice(1)])
    in_pieces = TableRows(spec=whole.spec, valid=pieces, shown=pieces, invalid=2)
    assert Page("r", [in_pieces], []).text(accept) == Page("r", [whole], []).text(accept)
    for nothing in (whole.shown.slice(0, 0), pa.schema(whole.shown.schema).empty_table()):
        empty = TableRows(spec=whole.spec, valid=nothing, shown=nothing, invalid=2)
        text, _ = Page("r", [empty], []).text(accept)
        assert [name for name, _, _ in samples(text.decode(), accept)] == [
            "phasewatch_odd_not_interpretable"
        ]


def test_a_text_is_made_once_for_each_format():
    page = Page("r", [table([("a", "b")], [1.0], "h")], [])
    texts = {accept: page.text(accept)[0] for accept in FORMATS}
    assert all(page.text(accept)[0] is text for accept, text in texts.items())
    assert len(set(texts.values())) == 2


def test_all_heads_of_a_large_model_are_on_the_page():
    heads = list(itertools.product(map(str, range(96)), repeat=2))
    scores = np.random.default_rng(0).random(len(heads), dtype=np.float32)
    text, _ = Page("r", [table(heads, scores.tolist(), "h")], []).text("")
    read = {(s["series"], s["alpha"]): value for _, s, value in samples(text.decode(), "")[1:]}
    assert read == dict(zip(heads, scores.astype(float).tolist(), strict=True))
