"""What ends a run between two steps, at the same step on all ranks: a signal, or the end of its launcher."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from higgs_ds.common import interrupts
from higgs_ds.common.distributed import max_over_ranks

LAUNCHER_GONE = 1000  # larger than any signal number
_SCRIPTS, _MODULES = ("deepspeed", "torchrun"), ("deepspeed.launcher.launch", "torch.distributed.run")


class StopSignals:
    """Within the block, signals are only recorded; a second Ctrl-C raises Interrupted.

    A handler must not do more: saving needs all ranks, and they do not receive a signal at the same moment, if at all.
    A signal that came too late to be a `stop_reason` raises Interrupted at the end of the block. Outside the main
    thread, where Python allows no handlers, signals keep their effect.
    """

    def __init__(self) -> None:
        self._received, self._is_reason = 0, False
        self._block = contextlib.ExitStack()
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = _find_launchers()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._block.enter_context(interrupts.recorded("after this step, and saves a checkpoint"))
            handled = interrupts.handled_signals()
            self._previous = {number: signal.signal(number, self._record) for number in handled}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_reason:
            interrupts.ignore_signals()
        self._block.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self._received and not self._is_reason:
            raise interrupts.Interrupted(self._received)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received, now = self._received or number, time.monotonic()  # deepspeed sends SIGTERM after a Ctrl-C
        if interrupts.is_again(number, self._interrupted_at, now):
            raise interrupts.Interrupted(signal.SIGINT)
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = now
            if not interrupts.is_watched():
                interrupts.print_note()

    def stop_reason(self) -> str | None:
        """Return in words what ends the run, if any rank has a reason. Every rank must call this, at the same point."""
        if not self._received and not all(map(_is_running, self._launchers)):
            self._received = LAUNCHER_GONE
        number = max_over_ranks(self._received)
        self._is_reason |= bool(number)
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
