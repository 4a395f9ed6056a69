"""This process among the others: rank, world size, device, and the few exchanges that training needs."""

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
# Ranks wait here for the slowest one to encode its share of the audio: far longer than any exchange while training.
TIMEOUT = datetime.timedelta(minutes=60)
# A launcher ends all ranks as soon as one has left, and takes the exit code of the first: so long do others wait who
# have nothing to say of their own.
EXIT_DELAY_S = 2
_host_group: dist.ProcessGroup | None = None  # ranks' processors among themselves; None where all ranks are on CPUs


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine, as torchrun or deepspeed's launcher tells."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        # A scheduler may show each rank its own GPU alone.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def run_ranks(main: Callable[[], None]) -> int:
    """Run `main` on every rank between setting up and taking down the process group; return the exit code.

    Errors that all ranks agreed on are printed by rank 0 alone. Any other one is printed before this rank's connections
    are closed, on which the other ranks fail: whoever fails first speaks first.
    """
    join_ranks()
    sys.excepthook = _exit_after_uncaught(sys.excepthook)  # behind that of torch, which names the rank in every line
    try:
        main()
    except HiggsError as error:
        return _leave_group(error)
    except (RuntimeError, dist.DistError) as error:
        if not _is_lost_connection(error):
            raise
        return _leave_group(LostRankError(f"rank {rank()}: another rank has ended; what it said tells why ({error})"))
    dist.destroy_process_group()
    return EXIT_OK


def _leave_group(error: HiggsError) -> int:
    speaks, lost = is_main() or not error.on_all_ranks, isinstance(error, LostRankError)
    if speaks:
        sys.stdout.flush()  # as in errors.exit_code_of
        print(f"error: {error}", file=sys.stderr, flush=True)
    if lost or not speaks:
        time.sleep(EXIT_DELAY_S)
    if not lost:  # else there is nobody to take leave of, for whom NCCL would wait
        dist.destroy_process_group()
    return error.exit_code


def _is_lost_connection(error: Exception) -> bool:
    """Whether a rank could not reach another one. gloo's errors are plain RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _exit_after_uncaught(show: ExceptHook) -> ExceptHook:
    """Show an error that nobody has caught, and end this process without another one on top of it; see `leave`."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        exit_process(EXIT_BUG)

    return hook


def exit_process(exit_code: int) -> NoReturn:
    """End this process.

    Without Python's own shutdown on CPU ranks, where a thread of PyTorch 2.11's gloo may still be letting go of a
    tensor and aborts the process for want of the interpreter (seen about once in 50 runs of two ranks), and after an
    error, where a shutdown could wait for ranks that have gone.
    """
    if device().type == "cuda" and exit_code == EXIT_OK:
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def join_ranks() -> None:
    """Set up the process group, from what a launcher or Slurm has set, or for this process alone."""
    if "RANK" not in os.environ:
        os.environ.update(slurm_ranks(os.environ) or _single_process())
    here = device()
    if here.type == "cuda":
        # Lengths differ from step to step; with segments that grow, what one leaves behind serves the next.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=TIMEOUT)
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if here.type == "cuda" else None


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher would have set, from the variables that srun sets for each task; empty outside of srun.

    In a batch script, too, SLURM_PROCID is set, but not the step's own variables: what is started there is alone.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    first_host = re.match(r"([^,\[]+)(?:\[(\d+))?", environment["SLURM_STEP_NODELIST"])
    on_first_node = re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])
    assert first_host and on_first_node  # noqa: PT018 - of no other form, as Slurm writes them
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": on_first_node[0],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or "".join(filter(None, first_host.groups())),
        # Alike on all nodes, and unlike another job's that has a rank on the same one.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (8 * job + step) % 20000),
    }


def _single_process() -> dict[str, str]:
    """A world of one, for a process that no launcher has started."""
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
    """The element-wise sum of a tensor over all ranks, on every rank. Leaves the argument as it was."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """The largest of all ranks' numbers. It goes from host to host, so that no GPU has to be waited for."""
    if world_size() == 1:
        return value
    highest = torch.tensor(value)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=_host_group)
    return int(highest)


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_problems(problems: list[str]) -> None:
    """Raise one InputError on every rank that holds the problems of all ranks, each once; return if there are none."""
    found = list(dict.fromkeys(problem for share in gather_objects(problems) for problem in share))
    if found:
        error = InputError(found)
        error.on_all_ranks = True
        raise error


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it raises InputError on any, raise it on all."""
    problems: list[str] = []
    result = None
    try:
        result = action()
    except InputError as error:
        problems = error.problems
    raise_problems(problems)
    return cast(T, result)


def on_main(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and give its result to every rank; an error of it is raised on every rank."""
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


def on_main_consuming(made: Iterator[T], action: Callable[[Iterator[T]], Any]) -> Any:
    """As `on_main`, for an action that takes what all ranks make together, one after another.

    What the action leaves is made all the same: each time, the other ranks wait for rank 0.
    """

    def act() -> Any:
        try:
            return action(made)
        finally:
            _exhaust(made)

    if not is_main():
        _exhaust(made)
    return on_main(act)


def _exhaust(made: Iterator[Any]) -> None:
    for _ in made:
        pass
