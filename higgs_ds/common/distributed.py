"""Distributed state of this process (rank, world size, device) and the few collectives that training needs.

torch is imported only where a tensor or another rank takes part, so that a check of data on one rank needs no torch.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from higgs_ds.common.errors import HiggsError, InputError
from higgs_ds.common.rank_variables import Ranks, read_ranks

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Ranks wait for the slowest one to encode its share of the audio, which takes far longer than any collective during
# training.
TIMEOUT = datetime.timedelta(minutes=60)
_ranks = Ranks()  # of a process that has joined no others: a command that runs alone
_host_group: Any = None  # gloo, for exchanges between CPUs; None if gloo is the default group


def rank() -> int:
    return _ranks.rank


def world_size() -> int:
    return _ranks.world_size


def local_world_size() -> int:
    """Return the number of ranks on this machine, as set by torchrun or the deepspeed launcher."""
    return _ranks.local_world_size


def is_main() -> bool:
    return rank() == 0


def device() -> torch.device:
    """Return this rank's GPU, or the CPU if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        # A scheduler may make only its own GPU visible to each rank.
        return torch.device("cuda", _ranks.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def kept_generators() -> AbstractContextManager[None]:
    """Return a context after which torch's generators, of the CPU and of this rank's GPU, are as they were before."""
    import torch

    here = device()
    return torch.random.fork_rng(devices=[here] if here.type == "cuda" else [])


def take_rank() -> None:
    """Read this process's rank from the variables of a launcher or of Slurm. Raises InputError."""
    global _ranks
    _ranks = read_ranks(os.environ)


def join_ranks() -> None:
    """Set up the process group of all ranks, once per process: DeepSpeed keeps references to it.

    Call `take_rank` first.

    Raises:
        InputError: the port of rank 0 is in use.
    """
    import torch
    import torch.distributed as dist

    here = device()
    if here.type == "cuda":
        # Lengths differ from step to step. Expandable segments let one step reuse the memory that another one freed.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(here)
    if dist.is_initialized():
        return
    backend = "nccl" if here.type == "cuda" else "gloo"
    if world_size() == 1:  # nobody else connects: any free port is right, whatever a launcher has set
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        os.environ.update(Ranks(port=store.port).variables())  # DeepSpeed reads them
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)
    else:
        os.environ.update(_ranks.variables())
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except dist.DistNetworkError as error:
            where = f"MASTER_ADDR {_ranks.address}, MASTER_PORT {_ranks.port}"
            raise InputError(
                f"{where}: rank {rank()} cannot connect ({error}); give a reachable address and a port that no other "
                "process uses, with the options of your launcher"
            ) from error
    global _host_group
    _host_group = dist.new_group(backend="gloo", timeout=TIMEOUT) if here.type == "cuda" else None


def leave_ranks() -> None:
    """Close the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of a tensor over all ranks, on every rank. The argument is not modified."""
    import torch.distributed as dist

    total = values.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """Return the maximum over all ranks. It is exchanged between CPUs, so that no rank waits for its GPU."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    highest = torch.tensor(value)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=_host_group)
    return int(highest)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return the value of rank 0 on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

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
