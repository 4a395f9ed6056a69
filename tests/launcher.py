"""Start training on several local ranks like a launcher: one process per rank, described by the environment."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
LAUNCH = Path(__file__).parents[1] / "launch"
# What tests train on. These options come before a run's own options, which take precedence.
RANDOM = [
    "--base_ckpt", "tiny-random-base",
    "--train_manifest", str(Path(__file__).parents[1] / "samples" / "voices.jsonl"),
]  # fmt: skip
TRAIN = [sys.executable, str(LAUNCH / "train.py"), *RANDOM]


def overriding(options: Sequence[str]) -> list[str]:
    """Return options without those that come again later, which the parser refuses."""
    groups: list[list[str]] = []
    for word in options:
        if not groups or word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    last = {group[0]: group for group in groups}
    return [word for group in groups if last[group[0]] is group for word in group]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def default_port() -> Iterator[None]:
    """Reserve the launchers' default port for one test at a time."""
    with (Path(tempfile.gettempdir()) / "higgs_ds_default_port.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # Ranks whose collectives differ fail at once instead of waiting for each other.
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    }


def start_ranks(world_size: int, command: Sequence[str]) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            overriding(command),
            env=rank_environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def _last_logged_step(run_folder: Path) -> int:
    return int(json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def kill_after_step(processes: list[subprocess.Popen[str]], run_folder: Path, step: int) -> None:
    """Wait for the checkpoint of `step` and the log line after it, then kill every rank."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (run_folder / f"checkpoint-{step}").is_dir() and _last_logged_step(run_folder) > step:
            break
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0][-4000:]
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def _base_of(run: Sequence[str]) -> list[str]:
    return RANDOM[:2] if "--pairs" in run else RANDOM


def train_runs(world_size: int, runs: Sequence[Sequence[str]], timeout_s: float = 900, report: bool = False) -> None:
    """Run several trainings, each given by its command line, one after another in one group of ranks.

    They use the random base and the sample voices unless a run names others. The tables at the start are not planned,
    and report pages are not drawn unless `report` is set: that takes longer than a run.
    """
    unreported = ["--quiet"] if report else ["--quiet", "--no_report"]
    with tempfile.NamedTemporaryFile(mode="r", suffix=".log") as log:
        job = {
            "ranks": world_size, "runs": [overriding([*_base_of(run), *run, *unreported]) for run in runs],
            "log": log.name, "timeout_s": timeout_s, "environment": dict(os.environ),
        }  # fmt: skip
        codes = _run_job(job, os.environ)
        assert codes == [0] * world_size, f"ranks ended with {codes}:\n{log.read()[-9000:]}"


def run_script(
    name: str,
    options: Sequence[str],
    folder: Path,
    timeout_s: float = 300,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Do what `python launch/NAME.py OPTIONS` does in a folder, without a new process's seconds of imports."""
    command = [str(LAUNCH / f"{name}.py"), *overriding(options)]
    environment = dict(environment or os.environ)
    with tempfile.NamedTemporaryFile(mode="r") as stdout, tempfile.NamedTemporaryFile(mode="r") as stderr:
        script = {
            "command": command, "folder": str(folder), "environment": environment,
            "outputs": [stdout.name, stderr.name],
        }  # fmt: skip
        code = _run_job({"script": script, "timeout_s": timeout_s}, environment)
        assert isinstance(code, int), f"{command} did not end within {timeout_s} s:\n{stderr.read()[-9000:]}"
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


def run_code(code: str, folder: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python code in a folder, in a process that has already imported everything; tests' modules included."""
    script = folder / "code.py"
    script.write_text(code, encoding="utf-8")
    return run_script(str(script.with_suffix("")), [], folder, timeout_s)


def _run_job(job: dict[str, Any], environment: Mapping[str, str]) -> Any:
    # Libraries read the location of the hub's cache when they are imported.
    server = _server(tuple((name, environment[name]) for name in sorted(environment) if name.startswith("HF_")))
    assert server.stdin
    assert server.stdout
    print(json.dumps(job), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline() or '["the server of ranks has ended"]')


@functools.cache
def _server(hub: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """Start a process that has imported everything and whose forks are the ranks; it ends when its stdin closes."""
    return subprocess.Popen(
        [sys.executable, str(WORKER)],
        env=os.environ | dict(hub),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
