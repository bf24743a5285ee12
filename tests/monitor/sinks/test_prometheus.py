"""The Prometheus sink: what is on its page and under which names, the series budget, when the page
is rendered, where it listens and that it stops, and the landing page in a real browser.
"""

import http.client
import itertools
import logging
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import prometheus_client.openmetrics.parser
import prometheus_client.parser
import psutil
import pytest

import monitor.sinks.prometheus
from monitor.record import Dim, Field, Measurement, ProbeSpec, Reading
from monitor.sinks import PrometheusSink
from tests.monitor.sinks.fabricated import START, heads, losses, measurement, moment


@pytest.fixture
def make():
    """Makes sinks that are closed after the test."""
    made = []

    def make(run="r", **more):
        made.append(PrometheusSink(run, **({"port": 0} | more)))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def get(url: str, accept: str = "") -> tuple[str, str]:
    """The body and the content type of a page."""
    request = urllib.request.Request(url, headers={"Accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
        return answer.read().decode(), answer.headers["Content-Type"]


def families(sink: PrometheusSink) -> dict:
    """What a scraper reads, by name of the metric family."""
    text, _ = get(f"{sink.url}/metrics")
    parsed = list(prometheus_client.parser.text_string_to_metric_families(text))
    assert len({family.name for family in parsed}) == len(parsed)
    return {family.name: family for family in parsed}


def values(sink: PrometheusSink, name: str, *labels: str) -> dict:
    """The values of one metric by the given labels."""
    found = {}
    for family in families(sink).values():
        for sample in family.samples:
            if sample.name == name:
                where = tuple(sample.labels[label] for label in labels)
                assert where not in found
                found[where] = sample.value
    return found


def value(sink: PrometheusSink, name: str) -> float:
    """The value of a metric that has one series."""
    ((_, only),) = values(sink, name).items()
    return only


def listening_ports(address: str) -> set[int]:
    """Ports on which this process listens at an address."""
    connections = psutil.Process().net_connections(kind="tcp4")
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    return {place.port for place in listening if place.ip == address}


# What is on the page


def test_names_help_and_units_come_from_the_declaration(make):
    sink = make()
    sink.write(measurement(5))
    found = families(sink)
    assert found["phasewatch_heads_score"].documentation == "A made-up score. Nobody 2024."
    assert found["phasewatch_heads_score"].type == "gauge"
    assert "chance alone" in found["phasewatch_heads_score_null"].documentation
    assert "Standard error of score" in found["phasewatch_heads_score_stderr"].documentation
    assert found["phasewatch_heads_entropy_nats"].documentation.startswith("A made-up entropy.")
    # Entropy has no standard error and no null.
    assert {
        name for name in found if name.startswith(("phasewatch_heads", "phasewatch_losses"))
    } == {
        "phasewatch_heads_not_interpretable",
        "phasewatch_heads_score",
        "phasewatch_heads_score_stderr",
        "phasewatch_heads_score_null",
        "phasewatch_heads_score_layer_max",
        "phasewatch_heads_score_layer_mean",
        "phasewatch_heads_entropy_nats",
        "phasewatch_heads_entropy_layer_max_nats",
        "phasewatch_heads_entropy_layer_mean_nats",
        "phasewatch_losses_not_interpretable",
        "phasewatch_losses_loss_nats",
        "phasewatch_losses_loss_stderr_nats",
    }


def test_every_head_has_its_value(make):
    sink = make()
    when = moment(5)
    sink.write(Measurement(moment=when, readings=(heads(when, score=[0.1, 0.2, 0.3, 0.4]),)))
    by_head = values(sink, "phasewatch_heads_score", "run", "layer", "head")
    # Stored as 32-bit floats, and shown as they are stored.
    assert by_head == {
        ("r", "0", "0"): float(np.float32(0.1)),
        ("r", "0", "1"): float(np.float32(0.2)),
        ("r", "1", "0"): float(np.float32(0.3)),
        ("r", "1", "1"): float(np.float32(0.4)),
    }
    assert set(values(sink, "phasewatch_heads_score_null", "layer", "head").values()) == {0.25}
    assert set(values(sink, "phasewatch_heads_score_stderr", "layer", "head").values()) == {0.125}
    assert values(sink, "phasewatch_heads_entropy_nats", "layer", "head")["1", "1"] == 0.375
    assert values(sink, "phasewatch_heads_score_layer_max", "run", "layer") == {
        ("r", "0"): float(np.float32(0.2)),
        ("r", "1"): float(np.float32(0.4)),
    }
    mean = values(sink, "phasewatch_heads_score_layer_mean", "layer")
    assert mean == {("0",): pytest.approx(0.15), ("1",): pytest.approx(0.35)}


def test_a_table_without_dimensions_has_one_series_a_column(make):
    sink = make("mine")
    when = moment(5, run="mine")
    sink.write(Measurement(moment=when, readings=(losses(when, loss=2.5),)))
    assert values(sink, "phasewatch_losses_loss_nats", "run") == {("mine",): 2.5}
    assert values(sink, "phasewatch_losses_loss_stderr_nats", "run") == {("mine",): 0.5}


def test_other_dimensions_become_labels(make):
    spec = ProbeSpec(
        name="concepts",
        help="h",
        source="s",
        dims=(Dim(name="concept", help="c"),),
        fields=(Field(name="score", help="h", stderr=False),),
        needs=(),
    )
    columns = {"concept": [3, 5], "score": [0.5, 0.25], "n": [1, 1], "validity": ["ok", "ok"]}
    sink = make()
    when = moment(1)
    sink.write(Measurement(moment=when, readings=(Reading.build(spec, when, columns),)))
    assert values(sink, "phasewatch_concepts_score", "concept") == {("3",): 0.5, ("5",): 0.25}
    assert not values(sink, "phasewatch_concepts_score_layer_max")


def test_rows_that_are_not_interpretable_are_counted_and_not_exposed(make):
    sink = make()
    when = moment(5)
    validity = ["ok", "attention is not causal", "ok", "no earlier copy is in view"]
    reading = heads(when, score=[0.1, 0.9, float("nan"), 0.9], validity=validity)
    sink.write(Measurement(moment=when, readings=(reading,)))
    assert set(values(sink, "phasewatch_heads_score", "layer", "head")) == {("0", "0")}
    assert set(values(sink, "phasewatch_heads_entropy_nats", "layer", "head")) == {("0", "0")}
    assert set(values(sink, "phasewatch_heads_score_layer_max", "layer")) == {("0",)}
    assert value(sink, "phasewatch_heads_not_interpretable") == 3
    text, _ = get(f"{sink.url}/metrics")
    assert "NaN" not in text


def test_the_page_says_when_and_what(make):
    sink = make("mine", info={"model": 'Tiny"LM"', "attempt": "2"})
    sink.write(measurement(5, run="mine"))
    assert value(sink, "phasewatch_step") == 5
    assert value(sink, "phasewatch_tokens") == 500
    measured = START.timestamp() + 5
    assert value(sink, "phasewatch_last_measurement_timestamp_seconds") == pytest.approx(measured)
    info = values(sink, "phasewatch_run_info", "run", "model", "attempt")
    assert info == {("mine", 'Tiny"LM"', "2"): 1.0}
    seconds = values(sink, "phasewatch_probe_duration_seconds", "run", "probe")
    assert seconds == {("mine", "heads"): 0.5, ("mine", "losses"): 0.25}


def test_before_the_first_measurement_the_page_says_who_is_there(make):
    sink = make("mine")
    assert values(sink, "phasewatch_run_info", "run") == {("mine",): 1.0}
    assert values(sink, "phasewatch_series_dropped_total", "run") == {("mine",): 0.0}
    assert not values(sink, "phasewatch_step")


def test_an_unknown_number_of_tokens_is_not_shown_as_0(make):
    sink = make()
    sink.write(Measurement(moment=moment(5, tokens=None)))
    assert not values(sink, "phasewatch_tokens")


def test_a_measurement_replaces_the_one_before(make):
    sink = make()
    sink.write(measurement(1))
    sink.write(measurement(2, attempt=2))
    assert set(values(sink, "phasewatch_heads_score", "layer", "head").values()) == {
        float(np.float32(2.02))
    }
    assert value(sink, "phasewatch_step") == 2
    # A probe that failed this time must not show the values of last time.
    sink.write(Measurement(moment=moment(3)))
    assert not values(sink, "phasewatch_heads_score", "layer", "head")


def test_failures_are_counted_by_part(make):
    sink = make()
    for step in range(3):
        sink.write(measurement(step, failures=["heads", "ParquetSink"] if step else ["heads"]))
    failures = values(sink, "phasewatch_failures_total", "run", "part")
    assert failures == {("r", "heads"): 3.0, ("r", "ParquetSink"): 2.0}
    assert families(sink)["phasewatch_failures"].type == "counter"


def test_openmetrics_for_those_who_ask_for_it(make):
    sink = make()
    sink.write(measurement(5, failures=["heads"]))
    text, kind = get(f"{sink.url}/metrics", "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert text.endswith("# EOF\n")
    parsed = prometheus_client.openmetrics.parser.text_string_to_metric_families(text)
    samples = {sample.name: sample.value for family in parsed for sample in family.samples}
    assert samples["phasewatch_step"] == 5
    assert samples["phasewatch_failures_total"] == 1
    # As Prometheus itself asks, and then as a browser does.
    _, kind = get(
        f"{sink.url}/metrics",
        "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.7,*/*;q=0.1",
    )
    assert kind.startswith("application/openmetrics-text")
    _, kind = get(f"{sink.url}/metrics", "text/html,*/*")
    assert kind == "text/plain; version=0.0.4; charset=utf-8"


def test_step_is_never_a_label(make):
    sink = make()
    sink.write(measurement(5))
    labels = {label for f in families(sink).values() for s in f.samples for label in s.labels}
    assert labels == {"run", "layer", "head", "probe"}


# The series budget

LAYERS, PER_LAYER = 4, 8
# Score and its two companions, and entropy.
COLUMNS = 4


def noisy(step: int, best: list[int], chance: np.random.Generator) -> Measurement:
    """Scores of noise, above which `best` stand out by far less than the noise of one of them."""
    when = moment(step)
    score = chance.normal(0.1, 0.02, size=LAYERS * PER_LAYER)
    score[best] = 0.3 + chance.normal(0, 0.15, size=len(best))
    return Measurement(
        moment=when, readings=(heads(when, layers=LAYERS, heads=PER_LAYER, score=score),)
    )


def test_everything_is_shown_where_it_fits(make):
    sink = make(budget=LAYERS * PER_LAYER * COLUMNS)
    sink.write(noisy(1, [], np.random.default_rng(0)))
    assert len(values(sink, "phasewatch_heads_score", "layer", "head")) == LAYERS * PER_LAYER
    assert value(sink, "phasewatch_series_dropped_total") == 0


def test_the_budget_holds_and_what_is_left_out_is_counted(make):
    sink = make(budget=10 * COLUMNS + 1)
    for step in range(3):
        sink.write(noisy(step, [], np.random.default_rng(step)))
        shown = [
            len(values(sink, name, "layer", "head"))
            for name in (
                "phasewatch_heads_score",
                "phasewatch_heads_score_stderr",
                "phasewatch_heads_score_null",
                "phasewatch_heads_entropy_nats",
            )
        ]
        assert shown == [10] * COLUMNS
    left_out = 3 * (LAYERS * PER_LAYER - 10) * COLUMNS
    assert value(sink, "phasewatch_series_dropped_total") == left_out


def test_layers_are_summed_up_over_all_their_heads_whatever_is_left_out(make):
    sink = make(budget=2 * COLUMNS)
    given = noisy(1, [5, 20], np.random.default_rng(0))
    sink.write(given)
    by_layer = given.frame("heads").groupby("layer")["score"]
    for name, expected in (("max", by_layer.max()), ("mean", by_layer.mean())):
        shown = values(sink, f"phasewatch_heads_score_layer_{name}", "layer")
        assert shown == {(str(k),): pytest.approx(v, rel=1e-6) for k, v in expected.items()}
        assert len(shown) == LAYERS
    assert len(values(sink, "phasewatch_heads_entropy_layer_max_nats", "layer")) == LAYERS


def test_the_best_heads_stay_through_the_noise(make):
    sink = make(budget=10 * COLUMNS)
    chance = np.random.default_rng(0)
    best = [3, 11, 18, 30]
    for step in range(5):
        sink.write(noisy(step, best, chance))
    kept = []
    for step in range(5, 25):
        sink.write(noisy(step, best, chance))
        shown = set(values(sink, "phasewatch_heads_score", "layer", "head"))
        assert {(str(k // PER_LAYER), str(k % PER_LAYER)) for k in best} <= shown
        kept.append(shown)
    changes = sum(len(now - before) for before, now in itertools.pairwise(kept))
    # The best of every step on its own would change several heads at each of the 19 steps.
    assert changes <= 10


def test_a_head_that_was_once_best_stays_when_it_falls(make):
    sink = make(budget=4 * COLUMNS)
    chance = np.random.default_rng(0)
    sink.write(noisy(0, [9], chance))
    when = moment(1)
    score = np.full(LAYERS * PER_LAYER, 0.1)
    score[[1, 2]] = 0.2
    reading = heads(when, layers=LAYERS, heads=PER_LAYER, score=score)
    sink.write(Measurement(moment=when, readings=(reading,)))
    shown = values(sink, "phasewatch_heads_score", "layer", "head")
    assert shown["1", "1"] == pytest.approx(0.1)


@pytest.mark.parametrize("budget", [0, 1, COLUMNS - 1])
def test_a_budget_for_less_than_one_row_leaves_the_summaries(make, budget):
    sink = make(budget=budget)
    sink.write(noisy(1, [], np.random.default_rng(0)))
    assert not values(sink, "phasewatch_heads_score", "layer", "head")
    assert len(values(sink, "phasewatch_heads_score_layer_max", "layer")) == LAYERS


# Rendering


@pytest.fixture
def renderings(monkeypatch):
    """One entry for each time that a page is rendered."""
    rendered = []
    choose = monitor.sinks.prometheus.choose_encoder

    def choose_watched(accept):
        encode, kind = choose(accept)

        def watched(registry):
            rendered.append(kind)
            return encode(registry)

        return watched, kind

    monkeypatch.setattr(monitor.sinks.prometheus, "choose_encoder", choose_watched)
    return rendered


def test_a_page_is_rendered_once_for_a_measurement(make, renderings):
    sink = make()
    pages = set()
    for step in (1, 2):
        sink.write(measurement(step))
        pages |= {get(f"{sink.url}/metrics")[0] for _ in range(5)}
        assert len(renderings) == step
    assert len(pages) == 2
    for _ in range(3):
        get(f"{sink.url}/metrics", "application/openmetrics-text; version=1.0.0")
    assert len(renderings) == 3


def test_pages_are_whole_while_measurements_arrive(make):
    sink = make()
    sink.write(measurement(0))
    seen, stop = [], threading.Event()

    def scrape():
        while not stop.is_set():
            seen.append((value(sink, "phasewatch_step"), get(f"{sink.url}/metrics")[0].count("\n")))

    thread = threading.Thread(target=scrape)
    thread.start()
    for step in range(200):
        sink.write(measurement(step))
    time.sleep(0.1)
    stop.set()
    thread.join()
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    assert len(seen) > 2
    assert len({lines for _, lines in seen}) == 1


def test_nobody_has_to_read(make):
    sink = make()
    begun = time.perf_counter()
    for step in range(50):
        sink.write(measurement(step))
    assert time.perf_counter() - begun < 5


def test_a_reader_that_hangs_holds_up_nobody(make):
    sink = make()
    sink.write(measurement(1))
    port = urllib.parse.urlsplit(sink.url).port
    with socket.create_connection(("127.0.0.1", port)) as hanging:
        hanging.sendall(b"GET /metrics HTTP/1.1\r\nHost:")
        sink.write(measurement(2))
        assert value(sink, "phasewatch_step") == 2
        begun = time.perf_counter()
        sink.close()
        assert time.perf_counter() - begun < 4
    with pytest.raises(urllib.error.URLError):
        get(f"{sink.url}/metrics")


# Where it listens


def test_a_taken_port_gives_the_next_free_one_and_a_warning(make, caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with caplog.at_level(logging.WARNING, logger="phasewatch"):
            sink = make(port=port)
        number = urllib.parse.urlsplit(sink.url).port
        assert port < number < port + 100
        assert f"port {port} is taken" in caplog.text
        assert str(number) in caplog.text
        assert value(sink, "phasewatch_series_dropped_total") == 0


def test_a_free_port_is_used_without_a_word(make, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sink = make(port=port)
    assert sink.url == f"http://127.0.0.1:{port}"
    assert caplog.records == []


def test_two_runs_side_by_side(make):
    one = make("one")
    other = make("other", port=urllib.parse.urlsplit(one.url).port)
    assert values(one, "phasewatch_run_info", "run") == {("one",): 1.0}
    assert values(other, "phasewatch_run_info", "run") == {("other",): 1.0}


def test_no_free_port_is_an_error(monkeypatch):
    def taken(address, **_):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", taken)
    with pytest.raises(OSError, match="ports 9464 to 9563 are all taken"):
        PrometheusSink("r", port=9464)


def test_an_address_of_another_machine_is_an_error():
    with pytest.raises(OSError, match=r"assign|address"):
        PrometheusSink("r", address="192.0.2.1", port=0)


def test_closing_frees_the_port_and_ends_the_thread(make):
    sink = make()
    port = urllib.parse.urlsplit(sink.url).port
    keep_alive = http.client.HTTPConnection("127.0.0.1", port)
    keep_alive.request("GET", "/metrics")
    assert keep_alive.getresponse().read()
    sink.close()
    assert not [t for t in threading.enumerate() if t.name == "phasewatch-metrics"]
    assert port not in listening_ports("127.0.0.1")
    socket.create_server(("127.0.0.1", port)).close()
    keep_alive.close()
    # And the next one can have it.
    assert make(port=port).url == f"http://127.0.0.1:{port}"


def test_only_this_machine_is_served_by_default(make):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sink = make(port=port)
    assert sink.url.startswith("http://127.0.0.1:")
    assert port in listening_ports("127.0.0.1")
    assert port not in listening_ports("0.0.0.0")


def test_other_addresses_where_asked_for(make):
    sink = make(address="0.0.0.0")
    port = urllib.parse.urlsplit(sink.url).port
    assert port in listening_ports("0.0.0.0")


@pytest.mark.parametrize(
    "path", ["/nothing", "/metrics/../../etc/passwd", "/docs", "/openapi.json"]
)
def test_nothing_else_is_served(make, path):
    sink = make()
    with pytest.raises(urllib.error.HTTPError) as raised:
        get(sink.url + path)
    assert raised.value.code == 404
    raised.value.close()


def test_nothing_is_logged_for_a_request(make, caplog, capfd):
    sink = make()
    with caplog.at_level(logging.DEBUG):
        get(f"{sink.url}/metrics")
    sink.close()
    assert [record for record in caplog.records if record.name == "root"] == []
    assert capfd.readouterr() == ("", "")


# The landing page


def test_the_landing_page_escapes_what_it_shows(make):
    # Names of runs are checked elsewhere: the page does not rely on it.
    sink = make("<script>alert(1)</script>")
    text, kind = get(sink.url)
    assert "<script>" not in text
    assert kind.startswith("text/html")


def test_the_landing_page_in_a_browser(make, tmp_path):
    chromium = shutil.which("chromium")
    assert chromium, "this test needs chromium on the PATH (Debian: apt-get install chromium)"
    sink = make("my-run")
    sink.write(measurement(1234, run="my-run"))
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        sink.url,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "<b>my-run</b>" in done.stdout
    assert "<b>1234</b>" in done.stdout
    assert '<a href="/metrics">' in done.stdout
    assert "<title>phasewatch</title>" in done.stdout


def test_numbers_survive_the_page(make):
    """Very small, very large and negative numbers are read back as they were."""
    sink = make()
    when = moment(2**31, tokens=10**15)
    given = np.array([1e-30, 3e38, -1.5, 0.0], dtype=np.float32)
    sink.write(Measurement(moment=when, readings=(heads(when, score=given),)))
    shown = values(sink, "phasewatch_heads_score", "layer", "head")
    assert list(shown.values()) == given.astype(float).tolist()
    assert value(sink, "phasewatch_step") == 2**31
    assert value(sink, "phasewatch_tokens") == 10**15
