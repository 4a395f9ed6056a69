"""What ends a run between two steps, at the same step on all ranks: a signal, or the end of its launcher."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from higgs_ds.common.distributed import is_main, max_over_ranks

# What a cluster's scheduler sends before a time limit or a preemption, Ctrl-C, and the end of a terminal.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A shell ignores these for a command in its background, or under nohup, which must stay so.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
AGAIN_AFTER_S = 1.0  # a launcher may pass on a Ctrl-C that the terminal has sent to all processes as well
_NOTE = b"\nCtrl-C: the run ends after this step, and saves a checkpoint; press Ctrl-C again to end it at once\n"
LAUNCHER_GONE = 1000  # larger than any signal number
_SCRIPTS, _MODULES = ("deepspeed", "torchrun"), ("deepspeed.launcher.launch", "torch.distributed.run")


class StopSignals:
    """Within the block, signals are only recorded; a second Ctrl-C raises KeyboardInterrupt.

    A handler must not do more: saving needs all ranks, and they do not receive a signal at the same moment, if at all.
    Outside the main thread, where Python allows no handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self._received = 0
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = _find_launchers()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in STOP_SIGNALS if not _is_ignored(number)]
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
                if is_main():
                    _write_note()
            elif now - self._interrupted_at > AGAIN_AFTER_S:
                raise KeyboardInterrupt

    def stop_reason(self) -> str | None:
        """Return in words what ends the run, if any rank has a reason. Every rank must call this, at the same point."""
        if not self._received and not all(map(_is_running, self._launchers)):
            self._received = LAUNCHER_GONE
        number = max_over_ranks(self._received)
        if number == LAUNCHER_GONE:
            return "the end of its launcher"
        return signal.Signals(number).name if number else None


def _is_ignored(number: int) -> bool:
    return number in _MAY_BE_IGNORED and signal.getsignal(number) == signal.SIG_IGN


def _write_note() -> None:
    """Write directly: Python's streams must not be entered from a signal handler."""
    with contextlib.suppress(OSError, ValueError):  # no terminal, or a notebook's output
        os.write(sys.stderr.fileno(), _NOTE)


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
