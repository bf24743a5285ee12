"""`phasewatch serve` as a process, and what may be in its way."""

import json
import signal
import socket
import subprocess
import urllib.parse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.monitor.service.served import ask, record
from tests.programs import PHASEWATCH, free_port, started, wait_for
from tests.recorded import get

COMMAND = [*PHASEWATCH, "serve"]


@pytest.fixture
def command(tmp_path):
    """Starts it; the process and its address."""

    def start(*options):
        said = (tmp_path / "said").open("w+")
        process = started([*COMMAND, *options], stdout=said, stderr=subprocess.STDOUT)

        def address():
            said.seek(0)
            found = [word for word in said.read().split() if word.startswith("http://")]
            return found[-1] if found else None

        return process, address, said

    return start


def test_control_c_ends_it_quietly(tmp_path, command):
    root = tmp_path / "runs"
    record(root, 1)
    process, address, said = command("--root", str(root), "--port", str(free_port()))
    with process as running, said:
        url = wait_for(address, "its address")
        assert json.loads(get(f"{url}/api/runs")[0])[0]["run"] == "r"
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
        said.seek(0)
        assert "Traceback" not in said.read()


def test_a_root_that_is_not_there_is_waited_for(tmp_path, command):
    root = tmp_path / "runs"
    process, address, said = command("--root", str(root), "--port", "0")
    with process, said:
        url = wait_for(address, "its address")
        assert json.loads(get(f"{url}/api/runs")[0]) == []
        record(root, 1)
        assert json.loads(get(f"{url}/api/runs")[0])[0]["run"] == "r"


def test_a_port_that_is_taken_is_passed_over_and_said(tmp_path, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process, address, said = command("--root", str(tmp_path), "--port", str(port))
        with process, said:
            url = wait_for(address, "its address")
            assert not url.endswith(f":{port}")
            assert get(f"{url}/healthz")[0] == '{"status":"ok"}'


def test_names_that_need_quoting(tmp_path, serve):
    sinkable = "a.b-c_d"
    record(tmp_path, 1, run=sinkable)
    record(tmp_path, 1, run="plain")
    # A folder may be named by hand.
    odd = 'x y&z="é"<b>'
    (tmp_path / "losses" / "run=plain").rename(tmp_path / "losses" / f"run={odd}")
    service = serve()
    assert {run["run"] for run in ask(service, "/api/runs")} == {sinkable, "plain", odd}
    body = get(f"{service.url}/runs")[0]
    assert "<b>" not in body
    assert f'href="/api/tables?run={urllib.parse.quote(odd)}"' in body
    rows = ask(service, "/api/series", run=odd, table="losses", field="loss", format="columns")
    assert rows["series"][0]["run"] == odd
    assert 'run="x y&z=\\"é\\"<b>"' in get(f"{service.url}/metrics")[0]


def test_the_files_of_another_tool_are_no_runs(tmp_path, serve):
    record(tmp_path, 1)
    folder = tmp_path / "other" / "run=theirs"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1.0]}), folder / "000000000001.parquet")
    pq.write_table(pa.table({"x": [1.0]}), tmp_path / "000000000001.parquet")
    assert [run["run"] for run in ask(serve(), "/api/runs")] == ["r"]


def test_a_closed_service_answers_no_more(tmp_path, serve):
    service = serve()
    get(f"{service.url}/healthz")
    service.close()
    with pytest.raises(OSError, match=r"refused|reset"):
        get(f"{service.url}/healthz")
