"""What ends a run between two steps, at the same step on all ranks: a signal, or the end of its launcher."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from higgs_ds.common.distributed import max_over_ranks

# What a cluster's scheduler sends before a time limit or a preemption.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LAUNCHER_GONE = 1000  # larger than any signal number
_SCRIPTS, _MODULES = ("deepspeed", "torchrun"), ("deepspeed.launcher.launch", "torch.distributed.run")


class StopSignals:
    """Within the block, signals are only recorded.

    A handler must not do more: saving needs all ranks, and they do not receive a signal at the same moment, if at all.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._launchers = _find_launchers()

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def stop_reason(self) -> str | None:
        """Return in words what ends the run, if any rank has a reason. Every rank must call this, at the same point."""
        if not self._received and not all(map(_is_running, self._launchers)):
            self._received = LAUNCHER_GONE
        number = max_over_ranks(self._received)
        if number == LAUNCHER_GONE:
            return "the end of its launcher"
        return signal.Signals(number).name if number else None


def _find_launchers() -> list[psutil.Process]:
    """Return this process's ancestors that are launchers: deepspeed's runner forwards no signal, and may be killed."""
    return list(itertools.takewhile(_is_launcher, psutil.Process().parents()))


def _is_launcher(process: psutil.Process) -> bool:
    """Whether a process is a launcher; not the shell that started one, which may end first."""
    try:
        program, *words = process.cmdline() or [""]
    except psutil.Error:
        return False
    named = any(Path(word).name in _SCRIPTS or word in _MODULES for word in words)
    return named and Path(program).name.startswith("python")


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
