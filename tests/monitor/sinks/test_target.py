"""The file in which Prometheus finds a run: its addresses, and that it is whole at any time."""

import json
import socket
import threading

import pytest

from monitor.sinks.target import Target


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:9464", "127.0.0.1:9464"),
        ("http://[::1]:9465", "[::1]:9465"),
        ("http://0.0.0.0:9466", f"{socket.gethostname()}:9466"),
        ("http://[::]:9467", f"{socket.gethostname()}:9467"),
    ],
)
def test_an_address_is_one_that_can_be_reached(tmp_path, url, address):
    target = Target(tmp_path, "r", url)
    expected = [{"targets": [address], "labels": {"run": "r"}}]
    assert json.loads(target.path.read_text()) == expected
    target.close()
    assert not list(target.path.parent.iterdir())
    target.close()


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="run"):
        Target(tmp_path, "../r", "http://127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_whoever_reads_finds_it_whole(tmp_path):
    path = Target(tmp_path, "r", "http://127.0.0.1:1").path
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                json.loads(path.read_text())
            except ValueError as error:
                wrong.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for port in range(300):
        Target(tmp_path, "r", f"http://127.0.0.1:{port + 1}")
    stop.set()
    thread.join()
    assert not wrong
