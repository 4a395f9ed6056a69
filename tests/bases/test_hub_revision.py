"""A hub id without a revision requests its pinned commit; with a revision, that revision. Seen from the server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import PROJECT

from higgs_ds.common.hub import PINNED

pytestmark = pytest.mark.slow

BASE = "bosonai/higgs-audio-v2-generation-3B-base"


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of an empty hub, and the paths requested from it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("prepare", [], PINNED[BASE]),
        ("train", ["--dry_run", "--base_revision", "main"], "main"),
    ],
)
def test_revision_asked_for(
    hub: tuple[str, list[str]], command: str, options: list[str], expected: str, tmp_path: Path
) -> None:
    address, asked = hub
    environment = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, f"{PROJECT}/launch/{command}.py", "--base_ckpt", BASE, *options],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"--base_ckpt {BASE}: not a local folder, and not available on the hub" in done.stderr
    assert any(BASE in path and f"/{expected}" in path for path in asked), asked
    assert "Traceback" not in done.stderr
