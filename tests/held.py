"""Hold a process at a place in its code until a file appears, so that a test can send signals exactly there."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import reduce
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

LAST_IMPORT = "higgs_ds.training.loop"  # of launch/train.py; all that it uses can be changed before


def hold(place: str, folder: Path, for_ever: bool = False) -> None:
    """Stop this process in a call: create the file at-RANK in `folder`, and wait there for the file `go`.

    Args:
        place: "module:function:n" or "module:class.method:n", for the n-th call.
        for_ever: wait in a function of C that no signal ends, as in a collective that another rank has left.
    """
    module, name, nth = place.split(":")
    *path, last = name.split(".")
    owner = reduce(getattr, path, import_module(module))
    original, calls = getattr(owner, last), 0

    def held(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(nth):
            (folder / f"at-{os.environ.get('RANK', '0')}").touch()
            if for_ever:
                _wait_in_c()
            while not (folder / "go").exists():
                time.sleep(0.01)
        return original(*args, **kwargs)

    setattr(owner, last, held)


def _wait_in_c() -> None:
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: not locked
    for _ in range(2):
        library.pthread_mutex_lock(mutex)


class _Finder(MetaPathFinder):
    """Calls an action when LAST_IMPORT is imported."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == LAST_IMPORT:
            sys.meta_path.remove(self)
            self.action()


def hold_by_environment() -> None:
    """Hold the ranks of a launcher; to be called by `sitecustomize`. HELD_AT is the place, HELD_IN the folder."""
    place, folder = os.environ["HELD_AT"], Path(os.environ["HELD_IN"])
    sys.meta_path.insert(0, _Finder(lambda: hold(place, folder, "HELD_FOR_EVER" in os.environ)))


def wait_until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    """Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s} s")
        time.sleep(0.01)


def interrupt(group: int, folder: Path, held_ranks: int, log: Path, note: str, twice: bool) -> float:
    """Press Ctrl-C once or twice when the first ranks are held, as a terminal does. Return when the last one was sent.

    Args:
        group: the process group of all ranks, and of their launcher.
        note: what must be printed while the ranks are held, before they are released or interrupted again; may be "".
    """
    wait_until(lambda: all((folder / f"at-{rank}").exists() for rank in range(held_ranks)))
    os.killpg(group, signal.SIGINT)
    sent_at = time.monotonic()
    wait_until(lambda: note in log.read_text(), 20)
    if twice:
        time.sleep(1.2)  # see interrupts.AGAIN_AFTER_S
        os.killpg(group, signal.SIGINT)
        sent_at = time.monotonic()
    elif note:
        (folder / "go").touch()
    return sent_at
