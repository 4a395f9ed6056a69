"""The server of launch/review.py by HTTP: what it sends, and what it refuses to anyone but its own page."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, VOICES, write_manifest

from higgs_ds.reviewing.review_list import ReviewList
from higgs_ds.reviewing.server import LARGEST_BODY, ReviewServer
from higgs_ds.reviewing.view import ROWS_PER_PAGE

PART = {"offset": 0.25, "duration": 0.75}
JSON = {"Content-Type": "application/json"}


class Client:
    """Sends requests to a server, as its own page does unless told otherwise."""

    def __init__(self, server: ReviewServer) -> None:
        self.server = server
        self.host = f"127.0.0.1:{server.server_port}"

    def request(
        self, method: str, address: str, body: Any = None, headers: dict[str, str] | None = None, token: bool = True
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=10)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        own = {"Host": self.host} | ({"Origin": f"http://{self.host}"} | JSON if body is not None else {})
        sent = {name: value for name, value in (own | (headers or {})).items() if value}
        connection.request(method, f"/{self.server.token}/{address}" if token else address, content, sent)
        answer = connection.getresponse()
        received = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), received

    def rows(self, query: str = "") -> dict[str, Any]:
        status, _, content = self.request("GET", f"rows?{query}")
        assert status == 200, content
        return json.loads(content)

    def change(self, action: str, **values: Any) -> tuple[int, dict[str, Any]]:
        status, _, content = self.request("POST", action, {"generation": 0} | values)
        return status, json.loads(content)


@contextlib.contextmanager
def served(path: Path) -> Iterator[Client]:
    with ReviewServer(ReviewList(path)) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01))
        thread.start()
        yield Client(server)
        server.shutdown()
        thread.join()


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    rows = [{"audio": str(VOICES / f"anna_0{i}.flac"), "text": f"Clip {i}.", "speaker": "anna"} for i in range(3)]
    rows += [rows[0] | PART, {"audio": "missing.wav", "text": "Not there."}, {"audio": "/etc/passwd", "text": "No."}]
    rows.append(rows[0] | PART | {"duration": 5})
    return write_manifest(tmp_path / "clips.jsonl", rows)


@pytest.fixture
def client(clips: Path) -> Iterator[Client]:
    with served(clips) as client:
        yield client


def test_rows(client: Client) -> None:
    page = client.rows()
    assert (page["total"], page["num_dropped"], page["matches"]) == (7, 0, 7)
    assert page["rows"][1] == {
        "row": 1, "text": "Clip 1.", "dropped": False, "speaker": "anna", "has_audio": True, "faults": [],
        "seconds": pytest.approx(soundfile.info(VOICES / "anna_01.flac").duration),
    }  # fmt: skip
    assert page["rows"][3]["seconds"] == 0.75
    assert page["rows"][4]["faults"] == ["audio: no such file"]
    assert page["rows"][5]["faults"][0].startswith("audio: cannot be read as audio")
    too_long = "audio: ends at 1.14 s, before the end of the clip (offset 0.25 s, duration 5 s)"
    assert page["rows"][6]["faults"] == [too_long]


def test_pages(tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "text": f"Clip {i}{' rare' if i % 60 == 7 else ''}."} for i in range(130)]
    with served(write_manifest(tmp_path / "clips.jsonl", rows)) as client:

        def numbers(query: str) -> list[int]:
            return [row["row"] for row in client.rows(query)["rows"]]

        assert numbers("start=0") == list(range(ROWS_PER_PAGE))
        assert numbers("start=100") == numbers("at=129") == numbers("start=999999") == list(range(100, 130))
        assert numbers("words=RARE") == [7, 67, 127]
        client.change("drop", row=67, dropped=True)
        assert (numbers("words=rare&shown=kept"), numbers("shown=dropped")) == ([7, 127], [67])
        assert (client.rows()["position"], client.rows()["start"]) == (67, 50)
        assert client.rows("words=nothing")["rows"] == []


def test_changes(client: Client, clips: Path) -> None:
    status, answer = client.change("edit", row=1, text="Clip one.", before="Clip 1.")
    assert (status, answer["row"]["text"]) == (200, "Clip one.")
    status, answer = client.change("drop", row=0, dropped=True)
    assert (status, answer["row"]["dropped"], answer["num_dropped"]) == (200, True, 1)
    kept = [json.loads(line)["text"] for line in clips.read_text().splitlines()]
    assert kept == ["Clip one.", "Clip 2.", "Clip 0.", "Not there.", "No.", "Clip 0."]
    status, answer = client.change("edit", row=1, text=" ", before="Clip one.")
    assert (status, answer["error"]) == (422, "text: is empty or blank; fill in the text or remove the sample")
    clips.write_text(clips.read_text() + "\n")
    status, answer = client.change("drop", row=1, dropped=True)
    assert (status, "changed by another program" in answer["error"]) == (409, True)
    assert client.rows()["generation"] == 1


def test_whole_file_and_ranges(client: Client) -> None:
    expected = (VOICES / "anna_01.flac").read_bytes()
    size = len(expected)
    status, headers, content = client.request("GET", "audio/1?generation=0")
    assert (status, headers["Content-Type"], headers["Accept-Ranges"]) == (200, "audio/flac", "bytes")
    assert content == expected
    for asked, start, end in (
        ("0-", 0, size), ("0-0", 0, 1), ("100-299", 100, 300), ("-500", size - 500, size),
        (f"{size - 1}-{size + 99}", size - 1, size), (f"-{size + 1}", 0, size),
    ):  # fmt: skip
        status, headers, content = client.request("GET", "audio/1?generation=0", headers={"Range": f"bytes={asked}"})
        assert (status, headers["Content-Range"]) == (206, f"bytes {start}-{end - 1}/{size}"), asked
        assert content == expected[start:end]
    for asked in (f"{size}-", "-0"):
        status, headers, content = client.request("GET", "audio/1?generation=0", headers={"Range": f"bytes={asked}"})
        assert (status, headers["Content-Range"], content) == (416, f"bytes */{size}", b"")
    for asked in ("bytes=0-1,5-6", "bytes=5-1", "bytes=-", "lines=0-1", "bytes=a-b"):
        assert client.request("GET", "audio/1?generation=0", headers={"Range": asked})[::2] == (200, expected)


def test_part_of_a_file(client: Client) -> None:
    """As the trainer cuts it, and with ranges."""
    status, headers, content = client.request("GET", "audio/3?generation=0")
    assert (status, headers["Content-Type"]) == (200, "audio/wav")
    heard, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    whole, _ = soundfile.read(VOICES / "anna_00.flac", dtype="float32")
    np.testing.assert_allclose(heard, whole[round(0.25 * rate) : round(rate)], atol=2**-15)
    assert client.request("GET", "audio/3?generation=0", headers={"Range": "bytes=44-99"})[2] == content[44:100]


GOOD = {"generation": 0, "row": 0, "dropped": True}
REFUSED: dict[str, tuple[int, str, str, Any, dict[str, str]]] = {
    "another host": (403, "GET", "rows", None, {"Host": "evil.example"}),
    "another host with this port": (403, "GET", "", None, {"Host": "127.0.0.1.evil.example:80"}),
    "an address of the network": (403, "GET", "rows", None, {"Host": "192.168.1.2"}),
    "a broken host": (403, "GET", "rows", None, {"Host": "[::1"}),
    "a file of the system as a row": (422, "GET", "audio/5?generation=0", None, {}),
    "a missing file": (422, "GET", "audio/4?generation=0", None, {}),
    "a row that does not exist": (404, "GET", "audio/7?generation=0", None, {}),
    "a negative row": (400, "GET", "audio/-1?generation=0", None, {}),
    "no generation": (400, "GET", "audio/1", None, {}),
    "an old generation": (409, "GET", "audio/1?generation=5", None, {}),
    "a path as a row": (404, "GET", "audio/../../../etc/passwd?generation=0", None, {}),
    "an escaped path": (400, "GET", "audio/..%2f..%2fetc%2fpasswd?generation=0", None, {}),
    "a path": (404, "GET", "/etc/passwd", None, {}),
    "a file of the page": (404, "GET", "page.html.j2", None, {}),
    "digits of another script": (400, "GET", "audio/%D9%A1?generation=0", None, {}),
    "a long number": (400, "GET", "rows?start=" + "9" * 99, None, {}),
    "an unknown choice": (400, "GET", "rows?shown=none", None, {}),
    "a change by GET": (404, "GET", "drop", None, {}),
    "another origin": (403, "POST", "drop", GOOD, {"Origin": "http://evil.example"}),
    "no origin": (403, "POST", "drop", GOOD, {"Origin": ""}),
    "the origin of a file": (403, "POST", "drop", GOOD, {"Origin": "null"}),
    "a change from a form": (415, "POST", "drop", GOOD, {"Content-Type": "text/plain"}),
    "too large": (413, "POST", "edit", GOOD | {"text": "x" * LARGEST_BODY}, {}),
    "without a length": (411, "POST", "drop", GOOD, {"Transfer-Encoding": "chunked"}),
    "a negative length": (411, "POST", "drop", GOOD, {"Content-Length": "-1"}),
    "no JSON": (400, "POST", "drop", b"{", {}),
    "nested JSON": (400, "POST", "drop", b"[" * 60000, {}),
    "no object": (400, "POST", "drop", [], {}),
    "no row": (400, "POST", "drop", {"generation": 0, "dropped": True}, {}),
    "a truth as a row": (400, "POST", "drop", GOOD | {"row": True}, {}),
    "a row below 0": (404, "POST", "drop", GOOD | {"row": -1}, {}),
    "a number as a truth": (400, "POST", "drop", GOOD | {"dropped": 1}, {}),
    "an unknown change": (404, "POST", "delete", GOOD, {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client: Client, clips: Path, name: str) -> None:
    """None is answered with more than the reason, and the list stays what it was."""
    expected, method, address, body, headers = REFUSED[name]
    before = clips.read_bytes()
    status, received, content = client.request(method, address, body, headers)
    assert status == expected, content
    assert set(json.loads(content)) == {"error"}
    assert received["Content-Type"] == "application/json"
    assert b"root:" not in content
    assert clips.read_bytes() == before
    assert client.rows()["num_dropped"] == 0


def test_nothing_without_the_token(client: Client, clips: Path) -> None:
    token = client.server.token
    assert len(token) >= 32
    for wrong in ("", token[:-1], f"{token}x", token.swapcase(), "%00"):
        for address in ("", "rows", "audio/1?generation=0", "nothing"):
            status, _, content = client.request("GET", f"/{wrong}/{address}", token=False)
            assert (status, b"another token" in content) == (403, True)
        assert client.request("POST", f"/{wrong}/drop", GOOD, token=False)[0] == 403
    with socket.create_connection(("127.0.0.1", client.server.server_port), timeout=10) as plain:
        plain.sendall(f"GET /\u00e9/rows HTTP/1.1\r\nHost: {client.host}\r\n\r\n".encode())
        assert plain.recv(12) == b"HTTP/1.1 403"
    for address in ("/", "/favicon.ico", "http://evil.example/", "*", "//"):
        assert client.request("GET", address, token=False)[0] == 403
    assert client.request("GET", f"/{token}", token=False)[1]["Location"] == f"/{token}/"
    assert client.rows()["num_dropped"] == 0


def test_page_and_its_headers(client: Client, clips: Path) -> None:
    _, headers, content = client.request("GET", "")
    (nonce,) = re.findall(r"script-src 'nonce-([\w-]+)'", headers["Content-Security-Policy"])
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert set(re.findall(r'nonce="([^"]*)"', content.decode())) == {nonce}
    assert nonce not in client.request("GET", "")[2].decode()
    assert client.server.token not in content.decode()
    assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")


def test_forwarded_ports_and_other_hosts(client: Client) -> None:
    """Through ssh -L, a browser names another port; served to a network, a machine has several addresses."""
    origin = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert client.request("POST", "drop", GOOD, origin)[0] == 200
    server = client.server
    for host, allowed, refused in (
        ("127.0.0.1", ["127.0.0.1", "[::1]:80", "LOCALHOST"], ["10.0.0.1", "", "a@b", os.uname().nodename]),
        ("::1", ["[::1]", "localhost:1"], ["[::2]", "example.org"]),
        ("0.0.0.0", ["10.0.0.1:80", "localhost", os.uname().nodename], ["example.org", "10.0.0.1.example.org"]),
    ):
        server.host = host
        assert [server.is_own_name(name) for name in allowed] == [True] * len(allowed), host
        assert [server.is_own_name(name) for name in refused] == [False] * len(refused), host
        assert server.is_local() == (host != "0.0.0.0")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command(clips: Path, number: signal.Signals) -> None:
    """Ctrl-C is how a review ends; other signals end it as they end every command."""
    command = [sys.executable, str(PROJECT / "launch" / "review.py"), str(clips)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == f"{clips}: 7 clips, 0 of them dropped\n"
    address = re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/ ", process.stdout.readline())
    assert address
    refused = subprocess.run([*command, "--port", address[1]], capture_output=True, text=True, check=False)
    assert (refused.returncode, f"process {process.pid} on" in refused.stderr) == (2, True)
    connection = http.client.HTTPConnection("127.0.0.1", int(address[1]))
    headers = {"Origin": f"http://127.0.0.1:{address[1]}", **JSON}
    connection.request("POST", f"/{address[2]}/drop", json.dumps(GOOD), headers)
    assert connection.getresponse().status == 200
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    if number == signal.SIGINT:
        assert (process.returncode, errors) == (0, "")
        assert output == f"{clips}: 1 of 7 clips dropped; every change is written\n"
    else:
        assert (process.returncode, errors) == (
            143, "error: interrupted by SIGTERM; what was written before is complete\n",
        )  # fmt: skip
    assert sorted(os.listdir(clips.parent)) == ["clips.jsonl", "clips.jsonl.dropped", "clips.jsonl.orig"]


@pytest.mark.slow
def test_bad_options(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "launch" / "review.py"), str(tmp_path / "none"), "--port", "70000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none: no such file or folder" in done.stderr
    assert "--port 70000: must be from 1 to 65535" in done.stderr
