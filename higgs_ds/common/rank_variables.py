"""The environment variables by which a launcher tells a process its rank: read, checked, or derived from Slurm's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from higgs_ds.common.errors import InputError

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HIGHEST_PORT = 65535
_SINGLE_PROCESS = ((None, None), (None, "1"), ("0", "1"))  # values of RANK and WORLD_SIZE


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all ranks. The defaults are those of a process without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    def variables(self) -> dict[str, str]:
        """Return the variables that a launcher would set; libraries read them."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size), "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


def read_ranks(environment: Mapping[str, str]) -> Ranks:
    """Return what a launcher has set, else what Slurm's variables say, else a process on its own.

    Variables that a launcher has left behind in a shell or a container do no harm where they can only mean a single
    process.

    Raises:
        InputError: the variables are incomplete or contradict each other; says which to set or to unset.
    """
    given = {name: environment[name] for name in REQUIRED if environment.get(name)}
    if "RANK" not in given:
        slurm = slurm_variables(environment)
        if slurm:
            return _checked(slurm, environment)
    if len(given) == len(REQUIRED):
        return _checked(given, environment)
    if (given.get("RANK"), given.get("WORLD_SIZE")) in _SINGLE_PROCESS:
        return Ranks()
    missing = [name for name in REQUIRED if name not in given]
    raise InputError(_advice(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing", given))


def _checked(values: Mapping[str, str], environment: Mapping[str, str]) -> Ranks:
    """Return the ranks that a complete set of variables describes. Raises InputError."""
    numbers = {name: values[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    wrong = [name for name, value in numbers.items() if not value.isdecimal()]
    if wrong:
        raise InputError(_advice(f"{', '.join(wrong)} must be a number", values))
    rank, world_size, local_rank, port = (int(value) for value in numbers.values())
    if rank >= world_size or local_rank >= world_size or not 0 < port <= _HIGHEST_PORT:
        rule = f"RANK and LOCAL_RANK must be below WORLD_SIZE, MASTER_PORT must be 1 to {_HIGHEST_PORT}"
        raise InputError(_advice(rule, values))
    local = values.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    local_world_size = int(local) if local and local.isdecimal() and 0 < int(local) <= world_size else 1
    return Ranks(rank, world_size, local_rank, local_world_size, values["MASTER_ADDR"], port)


def _advice(what: str, given: Mapping[str, str]) -> str:
    shown = ", ".join(f"{name}={given[name]}" for name in REQUIRED if name in given)
    return (
        f"environment: {shown} set, but {what}. A launcher (deepspeed, torchrun, srun) sets all of "
        f"{', '.join(REQUIRED)}. If these are left over, train in a single process after: unset "
        f"{' '.join(name for name in REQUIRED if name in given)}"
    )


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
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
