"""How the page is served: rendered once a measurement and whole, where the sink listens and that it
stops, and the landing page in a real browser.
"""

import http.client
import logging
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse

import psutil
import pytest

import monitor.sinks.exposition
from monitor.sinks import PrometheusSink
from tests.monitor.sinks.fabricated import measurement
from tests.monitor.sinks.scraped import value, values
from tests.recorded import get

# Rendering


@pytest.fixture
def renderings(monkeypatch):
    """One entry for each time that a page is rendered."""
    rendered = []
    choose = monitor.sinks.exposition.choose_encoder

    def choose_watched(accept):
        encode, kind = choose(accept)

        def watched(registry):
            rendered.append(kind)
            return encode(registry)

        return watched, kind

    monkeypatch.setattr(monitor.sinks.exposition, "choose_encoder", choose_watched)
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
    for step in range(100):
        sink.write(measurement(step))
    time.sleep(0.1)
    stop.set()
    thread.join()
    steps = [step for step, _ in seen]
    assert steps == sorted(steps)
    assert len(seen) > 2
    assert len({lines for _, lines in seen}) == 1


def test_nobody_has_to_read(make, renderings):
    sink = make()
    begun = time.perf_counter()
    for step in range(50):
        sink.write(measurement(step))
    assert time.perf_counter() - begun < 5
    assert renderings == []


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


def listening_ports(address: str) -> set[int]:
    """Ports on which this process listens at an address."""
    connections = psutil.Process().net_connections(kind="tcp4")
    listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
    return {place.port for place in listening if place.ip == address}


def test_a_free_port_is_used_without_a_word_and_serves_only_this_machine(make, caplog):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sink = make(port=port)
    assert sink.url == f"http://127.0.0.1:{port}"
    assert port in listening_ports("127.0.0.1")
    assert port not in listening_ports("0.0.0.0")
    assert caplog.records == []


def test_a_port_taken_by_another_run_gives_the_next_free_one_and_a_warning(make, caplog):
    one = make("one")
    port = urllib.parse.urlsplit(one.url).port
    with caplog.at_level(logging.WARNING, logger="phasewatch"):
        other = make("other", port=port)
    number = urllib.parse.urlsplit(other.url).port
    assert port < number < port + 100
    assert f"port {port} is taken" in caplog.text
    assert str(number) in caplog.text
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


def test_other_addresses_where_asked_for(make):
    sink = make(address="0.0.0.0")
    port = urllib.parse.urlsplit(sink.url).port
    assert port in listening_ports("0.0.0.0")


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
