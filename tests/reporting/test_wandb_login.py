"""--report_to wandb: a missing or rejected login is one line before anything is loaded; offline, none is needed."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from launcher import RANDOM, run_script

from higgs_ds.common.errors import InputError
from higgs_ds.reporting.trackers import check_wandb_login

KEY, OTHER_KEY = "a" * 40, "b" * 40
VIEWER = {"id": "1", "username": "me", "entity": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
ADVICE = "run `wandb login` or set WANDB_API_KEY; or set WANDB_MODE=offline, and send the run later with `wandb sync`"
MISSING = f"--report_to wandb: you are not logged in to Weights & Biases; {ADVICE}"


class Handler(BaseHTTPRequestHandler):
    """A W&B server that knows one key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        allowed = self.headers.get("Authorization") == f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}"
        answer = {"data": {"viewer": VIEWER}} if allowed else {"errors": [{"message": "no such key"}]}
        content = json.dumps(answer).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without any login, and nothing of W&B's in the environment."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path


@pytest.mark.parametrize("variables", [{}, {"WANDB_MODE": "online"}, {"WANDB_MODE": "shared"}])
def test_without_login(home: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        check_wandb_login(["tensorboard", "wandb"])
    assert error.value.problems == [MISSING]


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_modes_that_need_no_login(
    home: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    check_wandb_login(["wandb"])
    assert capfd.readouterr() == ("", "")


def test_without_wandb_nothing_is_checked(home: Path) -> None:
    check_wandb_login(["tensorboard"])


@pytest.mark.parametrize("stored", ["environment", "netrc"])
def test_accepted_login(
    home: Path, stored: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with wandb_server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        if stored == "netrc":
            machine = address.removeprefix("http://")
            (home / "netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
        else:
            monkeypatch.setenv("WANDB_API_KEY", KEY)
        check_wandb_login(["wandb"])
    assert capfd.readouterr() == ("", "")
    # Its service has ended: a thread of it could hold a lock while this process forks.
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("wandb")]


@pytest.mark.parametrize(
    ("key", "reason"),
    [(OTHER_KEY, "no such key"), ("short", "WANDB_API_KEY invalid: API key must have 40+ characters, has 5")],
)
def test_rejected_login(home: Path, key: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with wandb_server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", key)
        with pytest.raises(InputError) as error:
            check_wandb_login(["wandb"])
    (problem,) = error.value.problems
    assert problem.startswith("--report_to wandb: the login cannot be verified (")
    assert f"{reason}); {ADVICE}" in problem
    assert "\n" not in problem


@pytest.mark.slow
def test_a_run_ends_before_it_loads_anything(home: Path) -> None:
    """With all other problems, and without a traceback."""
    run = home / "run"
    argv = [*RANDOM, "--output_dir", str(run), "--report_to", "wandb", "--val_manifest", str(home / "none.jsonl")]
    environment = dict(os.environ) | {"HIGGS_DS_CACHE": str(home / "cache")}
    done = run_script("train", argv, home, environment=environment)
    assert done.returncode == 2
    assert f"  {MISSING}\n" in done.stderr
    assert done.stderr.startswith("error: 2 problems:\n")
    assert "none.jsonl" in done.stderr.splitlines()[2]
    assert not run.exists()
