"""Distributed state of this process (rank, world size, device) and the few collectives that training needs."""

from __future__ import annotations

import datetime
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from higgs_ds.common.errors import EXIT_BUG, EXIT_OK, HiggsError, InputError, LostRankError

T = TypeVar("T")
ExceptHook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]
# Ranks wait for the slowest one to encode its share of the audio, which takes far longer than any collective during
# training.
TIMEOUT = datetime.timedelta(minutes=60)
# A launcher ends all ranks as soon as one has exited, and uses the exit code of the first. Ranks without an error of
# their own wait this long, so that they are not the first.
EXIT_DELAY_S = 2
_host_group: dist.ProcessGroup | None = None  # gloo, for exchanges between CPUs; None if gloo is the default group


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this machine, as set by torchrun or the deepspeed launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Return this rank's GPU, or the CPU if there is no GPU."""
    if torch.cuda.is_available():
        # A scheduler may make only its own GPU visible to each rank.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def run_ranks(main: Callable[[], None]) -> int:
    """Set up the process group, run `main` on every rank, take the group down and return the exit code.

    An error that all ranks raise is printed by rank 0 only. Any other error is printed before this rank closes its
    connections. Only then do the other ranks fail, so that the cause is printed first.
    """
    join_ranks()
    sys.excepthook = _exit_after_uncaught(sys.excepthook)  # runs torch's hook first, which names the rank in every line
    try:
        main()
    except HiggsError as error:
        return _leave_group(error)
    except (RuntimeError, dist.DistError) as error:
        if not _is_lost_connection(error):
            raise
        return _leave_group(LostRankError(f"rank {rank()}: another rank has ended; see its own error ({error})"))
    dist.destroy_process_group()
    return EXIT_OK


def _leave_group(error: HiggsError) -> int:
    prints, lost = is_main() or not error.on_all_ranks, isinstance(error, LostRankError)
    if prints:
        sys.stdout.flush()  # as in errors.exit_code_of
        print(f"error: {error}", file=sys.stderr, flush=True)
    if lost or not prints:
        time.sleep(EXIT_DELAY_S)
    if not lost:  # NCCL would wait for the rank that is gone
        dist.destroy_process_group()
    return error.exit_code


def _is_lost_connection(error: Exception) -> bool:
    """Return whether a rank could not reach another one. gloo raises plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _exit_after_uncaught(show: ExceptHook) -> ExceptHook:
    """Return a hook that shows an uncaught error and ends the process without a further one; see `exit_process`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        exit_process(EXIT_BUG)

    return hook


def exit_process(exit_code: int) -> NoReturn:
    """End this process.

    Python's own shutdown is skipped in two cases. On CPU ranks, a thread of PyTorch 2.11's gloo may still release a
    tensor, and aborts the process because the interpreter is gone (seen about once in 50 runs of two ranks). After an
    error, the shutdown could wait for ranks that are gone.
    """
    if device().type == "cuda" and exit_code == EXIT_OK:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def join_ranks() -> None:
    """Set up the process group from the variables of a launcher or of Slurm, or for this process alone."""
    if "RANK" not in os.environ:
        os.environ.update(slurm_ranks(os.environ) or _single_process())
    here = device()
    if here.type == "cuda":
        # Lengths differ from step to step. Expandable segments let one step reuse the memory that another one freed.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=TIMEOUT)
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if here.type == "cuda" else None


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a launcher would set, derived from those of an srun task; empty outside of srun.

    A batch script has SLURM_PROCID too, but not the variables of a job step: a process started there runs alone.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    first_host = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    on_first_node = re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])
    assert first_host and on_first_node  # noqa: PT018 - Slurm writes no other form
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": on_first_node[0],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or "".join(filter(None, first_host.groups())),
        # The same on all nodes, and different from that of another job with a rank on the same node.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (8 * job + step) % 20000),
    }


def _single_process() -> dict[str, str]:
    """Return the variables of a world of size 1, for a process started without a launcher."""
    return {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def barrier() -> None:
    dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of a tensor over all ranks, on every rank. The argument is not modified."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """Return the maximum over all ranks. It is exchanged between CPUs, so that no rank waits for its GPU."""
    if world_size() == 1:
        return value
    highest = torch.tensor(value)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=_host_group)
    return int(highest)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_problems(problems: list[str]) -> None:
    """Raise one InputError with the distinct problems of all ranks on every rank; return if there are none."""
    found = list(dict.fromkeys(problem for rank_problems in gather_objects(problems) for problem in rank_problems))
    if found:
        error = InputError(found)
        error.on_all_ranks = True
        raise error


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it raises InputError on any rank, raise it on all of them."""
    problems: list[str] = []
    result = None
    try:
        result = action()
    except InputError as error:
        problems = error.problems
    raise_problems(problems)
    return cast(T, result)


def on_main(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result on every rank; if it raises a HiggsError, raise it on every rank."""
    outcome: Any = None
    if is_main():
        try:
            outcome = action()
        except HiggsError as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, HiggsError):
        outcome.on_all_ranks = True
        raise outcome
    return outcome


def on_main_consuming(items: Iterator[T], action: Callable[[Iterator[T]], Any]) -> Any:
    """Like `on_main`, for an action that consumes items which all ranks produce together, one after another.

    Items that the action does not consume are still produced: every item is a collective, in which the other ranks
    wait for rank 0.
    """

    def consume() -> Any:
        try:
            return action(items)
        finally:
            _exhaust(items)

    if not is_main():
        _exhaust(items)
    return on_main(consume)


def _exhaust(items: Iterator[Any]) -> None:
    for _ in items:
        pass
