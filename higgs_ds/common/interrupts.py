"""Signals that end a command: what they wait for, what a second Ctrl-C does, and the exit code.

Outside the steps of a training nothing is lost that a later command would need, and a signal ends the command at once:
it raises `Interrupted`. Python calls a handler only between two instructions of the main thread, which a kernel or a
collective can occupy for any time. A thread therefore receives the signals as well. It prints what the first Ctrl-C
waits for, and ends the process if the main thread does not.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from higgs_ds.common import distributed
from higgs_ds.common.errors import EXIT_SIGNAL

# What a cluster's scheduler sends before a time limit or a preemption, Ctrl-C, and the end of a terminal.
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A shell ignores these for a command in its background, or under nohup, which must stay so.
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
AGAIN_AFTER_S = 1.0  # a launcher may pass on a Ctrl-C that the terminal has sent to all processes as well
# How long the main thread may take to clean up before the process is ended: after one signal, and after a second
# Ctrl-C. Everything is written atomically, so what was saved before is complete in any case.
CLEAN_UP_S, CLEAN_UP_AGAIN_S = 4.0, 0.7


class Interrupted(KeyboardInterrupt):
    """A signal ends the command, as Ctrl-C does in any Python program."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Process:
    """What the handlers and the thread know of each other; one process has one of these."""

    watched = False  # the thread runs
    received = 0  # the signal that has raised Interrupted
    importing = False  # libraries may swallow an exception, or crash in one
    ending = False  # the command has ended, and only leaves
    recording = False  # see `recorded`
    finishing = False  # see `finishing`
    ends = ""  # when, in words, while signals are recorded


def end_of(number: int) -> str:
    """Return the last line of a command that a signal ends at once."""
    rank = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    return f"{rank}interrupted{by}; what was written before is complete"


def handled_signals() -> list[int]:
    """Return the signals that end a command: not those that whoever started it wants to be ignored."""
    ignored = {number for number in _MAY_BE_IGNORED if signal.getsignal(number) == signal.SIG_IGN}
    return [number for number in STOP_SIGNALS if number not in ignored]


def handle_signals() -> None:
    """From now on, a signal ends the command in this process. For a process that has no other purpose."""
    _Process.received, _Process.importing, _Process.ending, _Process.watched = 0, False, False, True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in handled_signals():
        signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """From now on, a signal changes nothing, as the command ends anyway; unless that takes longer than CLEAN_UP_S."""
    _Process.ending = True


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within the block, a signal ends the process of a command without an exception."""
    _Process.importing = True
    try:
        yield
    finally:
        _Process.importing = False


@contextlib.contextmanager
def recorded(ends: str) -> Iterator[None]:
    """Within the block, whose own handlers record signals, one Ctrl-C does not end the process, and a second one does.

    Args:
        ends: when the run ends, as the first Ctrl-C prints it unless it comes within `waiting`.
    """
    _Process.recording, _Process.ends = True, ends
    try:
        yield
    finally:
        _Process.recording = False


@contextlib.contextmanager
def waiting(ends: str) -> Iterator[None]:
    """Within the block, or the function that this decorates, a recorded Ctrl-C prints that the run ends then."""
    before, _Process.ends = _Process.ends, ends
    try:
        yield
    finally:
        _Process.ends = before


@contextlib.contextmanager
def finishing(ends: str) -> Iterator[None]:
    """Within the block, which finishes work after a signal, only a second Ctrl-C ends the process."""
    _Process.finishing = True
    try:
        with waiting(ends):
            if _Process.received == signal.SIGINT:
                print_note()
            yield
    finally:
        _Process.finishing = False


def print_note() -> None:
    """Print what a Ctrl-C waits for; on rank 0. Python's streams must not be entered from a handler."""
    if distributed.is_main():
        _print(f"\nCtrl-C: the run ends {_Process.ends}; press Ctrl-C again to end it at once\n")


def is_watched() -> bool:
    """Return whether `handle_signals` was called, whose thread prints the note."""
    return _Process.watched


def is_again(number: int, first_at: float | None, now: float) -> bool:
    """Return whether a signal is a second Ctrl-C. torchrun passes a second one on as SIGTERM."""
    return number in (signal.SIGINT, signal.SIGTERM) and first_at is not None and now - first_at > AGAIN_AFTER_S


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not (_Process.received or _Process.importing or _Process.ending):
        _Process.received = number
        raise Interrupted(number)


def _watch(reader: int) -> NoReturn:
    """Receive the signals of this process; runs in a thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # they interrupt a call in the main thread only
    first_at, ends_at, last, again = None, math.inf, 0, False
    while True:
        left_s = None if ends_at == math.inf else max(0.0, ends_at - time.monotonic())
        if not select.select([reader], [], [], left_s)[0]:
            if _Process.finishing and not again:
                ends_at = math.inf
                continue
            _end(last)
        for number in os.read(reader, 64):
            if number not in STOP_SIGNALS:
                continue
            last, now = number, time.monotonic()
            # deepspeed sends SIGTERM to a rank that leaves after rank 0 has.
            again |= is_again(number, first_at, now) and not (_Process.ending and number == signal.SIGTERM)
            if number == signal.SIGINT and first_at is None:
                first_at = now
                if _Process.recording:
                    print_note()
            if _Process.importing:
                _end(number)
            if again:
                last, ends_at = signal.SIGINT, min(ends_at, now + CLEAN_UP_AGAIN_S)
            elif not _Process.recording:
                ends_at = min(ends_at, now + CLEAN_UP_S)


def _end(number: int) -> NoReturn:
    _print(f"error: {end_of(number)}\n")
    os._exit(EXIT_SIGNAL + number)


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # no terminal, or a notebook's output
        os.write(sys.stderr.fileno(), text.encode())
