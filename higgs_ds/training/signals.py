"""What ends a run between two steps, on all ranks at the same one: a signal, or that its launcher has gone."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from higgs_ds.common.distributed import max_over_ranks

# What a cluster's scheduler sends ahead of a time limit or a preemption.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LAUNCHER_GONE = 1000  # beyond every signal's number
_SCRIPTS, _MODULES = ("deepspeed", "torchrun"), ("deepspeed.launcher.launch", "torch.distributed.run")


class StopSignals:
    """While the block runs, the signals only are remembered.

    A handler must do no more: saving needs all ranks, and these do not get a signal at the same moment, if at all.
    """

    def __init__(self) -> None:
        self._received = 0
        self._earlier: dict[int, Any] = {}
        self._launchers = _launchers()

    def __enter__(self) -> StopSignals:
        self._earlier = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def stop_reason(self) -> str | None:
        """What ends the run, in words, if it has come to any rank. Every rank must call this, at the same point."""
        if not self._received and not all(map(_runs, self._launchers)):
            self._received = LAUNCHER_GONE
        number = max_over_ranks(self._received)
        if number == LAUNCHER_GONE:
            return "the end of its launcher"
        return signal.Signals(number).name if number else None


def _launchers() -> list[psutil.Process]:
    """The processes above this one that are launchers: deepspeed's runner passes no signal on, and may be killed."""
    return list(itertools.takewhile(_is_launcher, psutil.Process().parents()))


def _is_launcher(process: psutil.Process) -> bool:
    """Not the shell that one was started from, which may end before it."""
    try:
        program, *words = process.cmdline() or [""]
    except psutil.Error:
        return False
    named = any(Path(word).name in _SCRIPTS or word in _MODULES for word in words)
    return named and Path(program).name.startswith("python")


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
