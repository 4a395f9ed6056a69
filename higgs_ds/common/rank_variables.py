"""The environment variables by which a launcher tells a process its rank: read, checked, or derived from Slurm's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from higgs_ds.common.errors import InputError

REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HIGHEST_PORT = 65535
_IN_STEP, _TASKS_PER_NODE = "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"
_OF_STEP = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", _TASKS_PER_NODE, "SLURM_STEP_NODELIST")
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
    # Of an srun task, only some are the user's; the others are derived from Slurm's variables.
    given = {name: values[name] for name in REQUIRED if environment.get(name) == values[name]} or values
    wrong = _not_numbers(values, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
    if wrong:
        raise InputError(_advice(wrong, given))
    rank, world_size, local_rank = int(values["RANK"]), int(values["WORLD_SIZE"]), int(values["LOCAL_RANK"])
    port = int(values["MASTER_PORT"])
    if rank >= world_size or local_rank >= world_size or not 0 < port <= _HIGHEST_PORT:
        rule = f"RANK and LOCAL_RANK must be below WORLD_SIZE, MASTER_PORT must be 1 to {_HIGHEST_PORT}"
        raise InputError(_advice(rule, given))
    local = values.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
    local_world_size = int(local) if local and local.isdecimal() and 0 < int(local) <= world_size else 1
    return Ranks(rank, world_size, local_rank, local_world_size, values["MASTER_ADDR"], port)


def _not_numbers(values: Mapping[str, str], names: Sequence[str]) -> str | None:
    wrong = [name for name in names if not values[name].isdecimal()]
    return f"{', '.join(wrong)} must be a number" if wrong else None


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

    Raises:
        InputError: some of srun's variables are missing, or are not what Slurm writes.
    """
    if not environment.get(_IN_STEP):
        return {}
    _check_step(environment)
    step = environment.get("SLURM_STEP_ID", "")  # may be a word in special steps: batch, extern, interactive
    port = 20000 + (8 * int(environment["SLURM_JOB_ID"]) + (int(step) if step.isdecimal() else 0)) % 20000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment[_IN_STEP],
        "LOCAL_WORLD_SIZE": _tasks_of_first_node(environment),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"]),
        # The same on all nodes, and different from that of another job with a rank on the same node.
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def _check_step(environment: Mapping[str, str]) -> None:
    """Check that srun's variables are complete: a container may be given only some of them. Raises InputError."""
    missing = [name for name in _OF_STEP if not environment.get(name)]
    if missing:
        wrong: str | None = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    else:
        numbers = {name: environment[name] for name in (_IN_STEP, *_OF_STEP)}
        numbers[_TASKS_PER_NODE] = _tasks_of_first_node(environment)
        wrong = _not_numbers(numbers, [name for name in numbers if name != "SLURM_STEP_NODELIST"])
    if wrong:
        shown = ", ".join(f"{name}={environment[name]}" for name in (_IN_STEP, *_OF_STEP) if environment.get(name))
        raise InputError(
            f"environment: {shown} set, but {wrong}. srun sets all of {', '.join((_IN_STEP, *_OF_STEP))}. To train in "
            f"a single process: unset {_IN_STEP}"
        )


def _tasks_of_first_node(environment: Mapping[str, str]) -> str:
    """Return the first number of a list like "2(x3),1"."""
    return re.split(r"[(,]", environment[_TASKS_PER_NODE])[0]


def _first_host(nodes: str) -> str:
    """Return the first of a list like "rack[1-2]n[05-08,11],login"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
