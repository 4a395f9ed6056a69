"""Start training on several local ranks, as a launcher does: one process per rank, found through the environment."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKER = Path(__file__).parent / "worker.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        # Ranks whose collectives differ fail at once, where they would wait for each other.
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    }


def start_ranks(world_size: int, command: Sequence[str]) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            command,
            env=rank_environment(rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def train_runs(world_size: int, runs: Sequence[Sequence[str]], timeout_s: float = 900) -> None:
    """Run several trainings, each given by its command line, one after another in one group of ranks."""
    processes = start_ranks(world_size, [sys.executable, str(WORKER), json.dumps([list(run) for run in runs])])
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{output[-6000:]}"
