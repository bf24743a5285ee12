"""Annotations, as a server on loopback receives them: what they say, that training does not wait,
and that what could not be sent is sent later.
"""

import http.server
import json
import threading
import time

import pytest

from monitor.detection import reading
from monitor.record import Measurement
from monitor.sinks import GrafanaSink
from tests.monitor.detection.made_up import notice
from tests.monitor.sinks.fabricated import START, moment


class Grafana(http.server.ThreadingHTTPServer):
    """Takes annotations, as long as it is `up`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.received, self.up, self.slow = [], True, 0.0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def wait_for(self, number):
        until = time.monotonic() + 10
        while len(self.received) < number and time.monotonic() < until:
            time.sleep(0.01)
        return self.received


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        time.sleep(self.server.slow)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.up:
            self.server.received.append((self.path, dict(self.headers), body))
        self.send_response(200 if self.server.up else 503)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def grafana():
    server = Grafana()
    yield server
    server.shutdown()
    server.server_close()


def said(step, state="provisional", label=""):
    when = moment(step)
    new = notice(state, step, step - 10, "induction head", label=label)
    return Measurement(moment=when, readings=(reading([new], when),))


def written_until_raised(sink):
    """The sink's thread knows a little later that nobody took it."""
    for _ in range(1_000):
        sink.write(Measurement(moment=moment(51)))
        time.sleep(0.01)


def test_what_an_annotation_says(grafana):
    sink = GrafanaSink(grafana.url + "/", token="secret")
    sink.write(said(50, label="the learning rate restarts"))
    sink.close()
    ((path, headers, body),) = grafana.received
    assert path == "/api/annotations"
    assert headers["Authorization"] == "Bearer secret"
    assert body["time"] == round((START.timestamp() + 50) * 1000)
    assert body["tags"] == ["phasewatch", "r", "induction head", "provisional"]
    assert body["text"] == (
        "induction head up, provisional at step 50, since step 40 (the learning rate restarts)"
    )


def test_training_does_not_wait_for_it(grafana):
    grafana.slow = 0.5
    sink = GrafanaSink(grafana.url)
    for step in (50, 60, 70):
        sink.write(said(step))
    assert grafana.received == []
    sink.close()
    assert [body["text"].split()[6] for _, _, body in grafana.received] == ["50,", "60,", "70,"]


def test_what_could_not_be_sent_is_said_and_sent_later(grafana):
    grafana.up = False
    sink = GrafanaSink(grafana.url)
    sink.write(said(50))
    with pytest.raises(OSError, match="took no annotation: HTTP Error 503"):
        written_until_raised(sink)
    grafana.up = True
    sink.write(said(60, "confirmed"))
    grafana.wait_for(2)
    sink.close()
    assert [body["tags"][-1] for _, _, body in grafana.received] == ["provisional", "confirmed"]


def test_closing_says_what_was_not_sent():
    sink = GrafanaSink("http://127.0.0.1:9", timeout=1.0)
    sink.write(said(50))
    with pytest.raises(OSError, match=r"1 annotations were not sent to http://127\.0\.0\.1:9/api"):
        sink.close()


@pytest.mark.parametrize("url", ["localhost:3000", "ftp://grafana", "", "http://"])
def test_addresses_of_no_use_are_refused(url):
    with pytest.raises(ValueError, match="expected Grafana's address"):
        GrafanaSink(url)
