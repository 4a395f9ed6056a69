"""The process of a command: its exit code on one rank or many, its output after the terminal is gone, its end."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

from higgs_ds.common import distributed, interrupts
from higgs_ds.common.errors import (
    EXIT_BUG,
    EXIT_OK,
    EXIT_SIGNAL,
    HiggsError,
    LostRankError,
    exit_code_of,
    print_error,
)

# A launcher ends all ranks as soon as one has exited, and uses the exit code of the first. Ranks without an error of
# their own wait this long, so that they are not the first.
EXIT_DELAY_S = 2


def run_command(command: Callable[[], int]) -> NoReturn:
    """Run a command and end this process with the exit code that it returns.

    In an interactive interpreter or a notebook, only the command ends.
    """
    if _is_interactive():
        sys.exit(command())
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        interrupts.handle_signals()
        exit_code = command()
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, interrupts.Interrupted) else signal.SIGINT
        print_error(interrupts.end_of(number))
        exit_code = EXIT_SIGNAL + number
    except Exception:  # noqa: BLE001 - it is shown with its traceback
        # Shown before this rank closes its connections, so that the cause is printed before the other ranks fail.
        # torch's hook names the rank in every line.
        sys.excepthook(*sys.exc_info())
        exit_code = EXIT_BUG
    exit_process(exit_code)


def run_ranks(main: Callable[[], None], together: bool = True) -> int:
    """Run `main` on every rank and return the exit code.

    An error that all ranks raise is printed by rank 0 only. Any other error is printed before this rank closes its
    connections. Only then do the other ranks fail, so that the cause is printed first.

    Args:
        together: whether a single rank needs a process group as well; DeepSpeed does.
    """
    exit_code = exit_code_of(distributed.take_rank)
    alone = distributed.world_size() == 1
    if exit_code or (alone and not together):
        return exit_code or exit_code_of(main)
    try:
        distributed.join_ranks()
        main()
    except HiggsError as error:
        return _leave(error)
    except RuntimeError as error:
        if alone or not _is_lost_connection(error):
            raise
        return _leave(LostRankError(f"rank {distributed.rank()}: another rank has ended; see its own error ({error})"))
    if not alone:
        distributed.leave_ranks()
    return EXIT_OK


def _leave(error: HiggsError) -> int:
    interrupts.ignore_signals()
    prints, lost = distributed.is_main() or not error.on_all_ranks, isinstance(error, LostRankError)
    if prints:
        print_error(error)
    if lost or not prints:
        time.sleep(EXIT_DELAY_S)
    if not lost and distributed.world_size() > 1:  # NCCL would wait for the rank that is gone
        distributed.leave_ranks()
    return error.exit_code


def _is_lost_connection(error: Exception) -> bool:
    """Return whether a rank could not reach another one. gloo raises plain RuntimeErrors that name its source files."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def exit_process(exit_code: int) -> NoReturn:
    """End this process.

    Python's own shutdown is skipped in two cases. On CPU ranks, a thread of PyTorch 2.11's gloo may still release a
    tensor, and aborts the process because the interpreter is gone (seen about once in 50 runs of two ranks). After an
    error, the shutdown could wait for ranks that are gone.
    """
    interrupts.ignore_signals()
    if exit_code == EXIT_OK and "torch" in sys.modules and distributed.device().type == "cuda":
        distributed.leave_ranks()
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Within the block, import large libraries without the garbage collector, which takes a fifth of the time.

    It would examine all imported objects again and again, although they live as long as the process. They are exempted
    from later collections, too.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        with interrupts.importing():
            yield
    finally:
        gc.freeze()
        gc.enable()


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")


class _LastingFile(io.FileIO):
    """Standard output or error that is discarded once nobody reads it, so that this cannot end a training.

    A terminal that is closed, and `| tee` at Ctrl-C, end before the training has saved its checkpoint.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by the shell: >&-
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    interactive = raw.isatty() or stream is sys.stderr
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=interactive)
