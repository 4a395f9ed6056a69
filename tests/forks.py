"""Run commands in forks of a process that has imported everything: imports would take most of a short run's time.

Import this before anything that imports torch, and start no thread before the last fork.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from higgs_ds.common.console import quiet_libraries

quiet_libraries()

import deepspeed  # noqa: E402
import pandas  # noqa: E402, F401 (pyarrow imports it late)
from launcher import free_port, overriding, rank_environment  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

from higgs_ds.common.process import run_command, run_ranks  # noqa: E402
from higgs_ds.options.command_line import parse_prepare_options, parse_train_options  # noqa: E402
from higgs_ds.training import loop, prepare  # noqa: E402

# Both libraries look these up once per process, which takes half a second.
_ = deepspeed.ops.__compatible_ops__
get_checkpoint_conversion_mapping("higgs_audio_v2")
gc.freeze()  # otherwise each fork's first collection copies the memory of all imports


def training(argv: Sequence[str]) -> Callable[[], None]:
    """Return a function that does what launch/train.py does with these options."""
    options = parse_train_options(overriding(argv))
    return lambda: loop.main(*options)


def preparing(argv: Sequence[str]) -> Callable[[], None]:
    """Return a function that does what launch/prepare.py does with these options."""
    options = parse_prepare_options(list(argv))
    return lambda: prepare.main(*options)


def start(ranks: int, main: Callable[[], None], log: Path) -> list[int]:
    """Start one process per rank and return their ids; their output is appended to `log`."""
    port, pids = free_port(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(rank_environment(rank, ranks, port))
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, sys.stdout.fileno())
            os.dup2(out, sys.stderr.fileno())
            run_command(lambda: run_ranks(main))
        pids.append(pid)
    return pids


def wait(pids: Sequence[int], timeout_s: float) -> list[int]:
    """Return exit codes, negative if killed. If one does not end, kill all of them and raise TimeoutError."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"of {len(pids)} ranks, some did not end within {timeout_s} s: {codes}")
        time.sleep(0.005)
    return [codes[pid] for pid in pids]
