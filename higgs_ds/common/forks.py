"""Run a function in several forked processes, which share the memory of this one."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from importlib.abc import MetaPathFinder
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from higgs_ds.common.errors import HiggsError
from higgs_ds.common.interrupts import STOP_SIGNALS

Result = TypeVar("Result")
GARBAGE_THRESHOLD = 20_000  # new objects after which the collector looks for cycles; Python's 700 suit smaller tasks


def may_fork() -> bool:
    """Return whether a fork is safe: a process with a CUDA context, or with connections to other ranks, has threads
    whose locks a fork may copy while they are held."""
    torch = sys.modules.get("torch")
    return torch is None or not (torch.cuda.is_initialized() or torch.distributed.is_initialized())


def run_in_forks(
    function: Callable[[int], Result], count: int, meanwhile: Callable[[], None] | None = None
) -> list[Result]:
    """Return the results of a function for 0 to `count` - 1, each computed in a process of its own.

    The processes end with this one, and ignore the signals that end it. The function must not use torch.

    Args:
        meanwhile: what this process does before it waits for them.

    Raises:
        HiggsError: the first one that a process has raised.
        RuntimeError: a process was ended, or has failed and printed why.
    """
    context = multiprocessing.get_context("fork")
    started: list[tuple[Any, Connection]] = []
    try:
        for number in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(function, number, sender), daemon=True)
            with blocked_signals():
                process.start()
            sender.close()
            started.append((process, receiver))
        if meanwhile is not None:
            meanwhile()
        return [_result_of(process, receiver) for process, receiver in started]
    finally:
        for process, receiver in started:
            process.kill()
            process.join()
            receiver.close()


@contextlib.contextmanager
def blocked_signals(numbers: Collection[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Start processes that ignore what is sent to all processes of a terminal or a job: only this one reacts to it.

    The mask of signals is inherited. A signal that arrives within the block is delivered after it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _NoPandas(MetaPathFinder):
    """Hides pandas, which pyarrow imports to recognize its objects when it converts a list: half a second, 40 MB."""

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("no pandas in this process", name=fullname)


def _run(function: Callable[[int], Any], number: int, sender: Connection) -> None:
    signal.set_wakeup_fd(-1)  # the pipe to a thread of the parent
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.meta_path.insert(0, _NoPandas())
    gc.freeze()  # else the collector copies the parent's memory, and takes a sixth of the time
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        sender.send(function(number))
    except HiggsError as error:
        sender.send(error)


def end_with_parent() -> None:
    """Exit when the parent does: a process whose parent was killed would go on, or wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _result_of(process: Any, receiver: Connection) -> Any:
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"a worker process has ended with exit code {process.exitcode}") from None
    if isinstance(result, HiggsError):
        raise result
    return result
