"""Ranks from the environment: set by a launcher, set by Slurm, left over, incomplete or wrong."""

from __future__ import annotations

import itertools

import pytest

from higgs_ds import cli
from higgs_ds.common.errors import InputError
from higgs_ds.common.rank_variables import REQUIRED, Ranks, read_ranks

ALONE = Ranks()
LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
PORT = 20000 + (8 * 4711 + 2) % 20000
PARTIAL = [set(names) for size in range(5) for names in itertools.combinations(REQUIRED, size)]


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(InputError) as caught:
        read_ranks(environment)
    (problem,) = caught.value.problems
    return problem


def advice(shown: str, what: str, names: str) -> str:
    return (
        f"environment: {shown} set, but {what}. A launcher (deepspeed, torchrun, srun) sets all of RANK, WORLD_SIZE, "
        f"LOCAL_RANK, MASTER_ADDR, MASTER_PORT. If these are left over, train in a single process after: unset {names}"
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ALONE),
        (LAUNCHED, Ranks(3, 4, 1, 1, "node1", 29500)),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "2"}, Ranks(3, 4, 1, 2, "node1", 29500)),  # torchrun
        (LAUNCHED | {"LOCAL_SIZE": "2"}, Ranks(3, 4, 1, 2, "node1", 29500)),  # deepspeed
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "8"}, Ranks(3, 4, 1, 1, "node1", 29500)),  # more than there are ranks
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "two"}, Ranks(3, 4, 1, 1, "node1", 29500)),
        (LAUNCHED | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, "node1", 29500)),
        # Left over, where they can only mean one process.
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, ALONE),
        ({"WORLD_SIZE": "1"}, ALONE),
        ({"LOCAL_RANK": "3"}, ALONE),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}, ALONE),
        ({"MASTER_PORT": "none"}, ALONE),
        (dict.fromkeys(REQUIRED, ""), ALONE),
        (LAUNCHED | {"RANK": "", "WORLD_SIZE": ""}, ALONE),
    ],
)
def test_ranks_without_slurm(environment: dict[str, str], expected: Ranks) -> None:
    assert read_ranks(environment) == expected


@pytest.mark.parametrize("names", PARTIAL, ids=lambda names: "+".join(sorted(names)) or "none")
def test_every_partial_set_is_refused_by_name_or_means_one_process(names: set[str]) -> None:
    """Of a rank of several, any variable may be missing. Without RANK and WORLD_SIZE, the rest means nothing."""
    environment = {name: LAUNCHED[name] for name in names}
    if not names & {"RANK", "WORLD_SIZE"}:
        assert read_ranks(environment) == ALONE
        return
    given, missing = ([name for name in REQUIRED if (name in names) == there] for there in (True, False))
    are = "is" if len(missing) == 1 else "are"
    shown = ", ".join(f"{name}={LAUNCHED[name]}" for name in given)
    assert refusal(environment) == advice(shown, f"{', '.join(missing)} {are} missing", " ".join(given))


ALL = " ".join(REQUIRED)
RULE = "RANK and LOCAL_RANK must be below WORLD_SIZE, MASTER_PORT must be 1 to 65535"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"RANK": "first"}, "RANK must be a number"),
        ({"RANK": "-1"}, "RANK must be a number"),
        ({"RANK": "1.0", "MASTER_PORT": "0x10"}, "RANK, MASTER_PORT must be a number"),
        ({"WORLD_SIZE": "four", "LOCAL_RANK": "?"}, "WORLD_SIZE, LOCAL_RANK must be a number"),
        ({"RANK": "4"}, RULE),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, RULE),
        ({"LOCAL_RANK": "4"}, RULE),
        ({"MASTER_PORT": "0"}, RULE),
        ({"MASTER_PORT": "65536"}, RULE),
    ],
)
def test_wrong_values_are_refused(changed: dict[str, str], what: str) -> None:
    values = LAUNCHED | changed
    shown = ", ".join(f"{name}={values[name]}" for name in REQUIRED)
    assert refusal(values) == advice(shown, what, ALL)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Ranks(3, 4, 1, 2, "n1", PORT)),
        # Exported in the batch script for other nodes to find, or left over: the user's word counts.
        ({"MASTER_PORT": "29500"}, Ranks(3, 4, 1, 2, "n1", 29500)),
        ({"MASTER_ADDR": "login"}, Ranks(3, 4, 1, 2, "login", PORT)),
        ({"MASTER_PORT": "", "MASTER_ADDR": ""}, Ranks(3, 4, 1, 2, "n1", PORT)),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "7"}, Ranks(3, 4, 1, 2, "n1", PORT)),  # left over; srun sets its own
        ({"RANK": ""}, Ranks(3, 4, 1, 2, "n1", PORT)),
        (LAUNCHED | {"RANK": "0", "WORLD_SIZE": "2"}, Ranks(0, 2, 1, 1, "node1", 29500)),  # torchrun in an srun task
    ],
)
def test_ranks_of_a_slurm_step(changed: dict[str, str], expected: Ranks) -> None:
    assert read_ranks(STEP | changed) == expected


@pytest.mark.parametrize("environment", [BATCH, {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4"}])
def test_a_batch_script_and_the_shell_of_salloc_are_one_process(environment: dict[str, str]) -> None:
    assert read_ranks(environment) == ALONE


@pytest.mark.parametrize(
    ("step", "port"),
    [
        ("4294967295", 20000 + (8 * 4711 + 4294967295) % 20000),
        ("4294967290", 20000 + (8 * 4711 + 4294967290) % 20000),  # the interactive step of salloc
        ("interactive", 20000 + 8 * 4711 % 20000),
        ("batch", 20000 + 8 * 4711 % 20000),
        ("", 20000 + 8 * 4711 % 20000),
    ],
)
def test_special_steps_have_a_valid_port(step: str, port: int) -> None:
    found = read_ranks(STEP | {"SLURM_STEP_ID": step})
    assert found == Ranks(3, 4, 1, 2, "n1", port)
    assert 1024 < found.port < 65536


@pytest.mark.parametrize("jobs", [(4711, 4712), (1, 2), (2**31, 2**31 + 1)])
def test_two_jobs_have_different_ports(jobs: tuple[int, int]) -> None:
    first, second = (
        {read_ranks(STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port for step in range(8)}
        for job in jobs
    )
    assert not first & second


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-a[003-004,7]", "gpu-a003"),
        ("a1,b[2-3]", "a1"),
        ("b[12,14],a1", "b12"),
        ("rack[1-2]-gpu", "rack1-gpu"),
        ("r[1-2]n[05-08]", "r1n05"),
        ("node-3.cluster.example.org,node-4", "node-3.cluster.example.org"),
    ],
)
def test_the_address_is_the_first_node(nodes: str, first: str) -> None:
    assert read_ranks(STEP | {"SLURM_STEP_NODELIST": nodes}).address == first


@pytest.mark.parametrize("name", [name for name in STEP if name not in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")])
def test_a_step_without_one_of_its_variables_is_refused(name: str) -> None:
    """A container may be given some of them only."""
    environment = {key: value for key, value in STEP.items() if key != name}
    if name == "SLURM_STEP_ID":
        assert read_ranks(environment).port == 20000 + 8 * 4711 % 20000
    else:
        assert f"{name} is missing" in refusal(environment)


@pytest.mark.parametrize(
    ("changed", "what", "unset"),
    [
        ({"SLURM_JOB_ID": "here"}, "SLURM_JOB_ID must be a number", "SLURM_JOB_ID"),
        ({"SLURM_STEP_TASKS_PER_NODE": "?"}, "SLURM_STEP_TASKS_PER_NODE must be a number", "SLURM_STEP_TASKS_PER_NODE"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT must be a number", "MASTER_PORT"),
        ({"MASTER_PORT": "70000"}, RULE, "MASTER_PORT"),
    ],
)
def test_wrong_values_in_a_slurm_step_are_refused_by_name(changed: dict[str, str], what: str, unset: str) -> None:
    """What Slurm has set right is not to be unset."""
    problem = refusal(STEP | changed)
    assert what in problem
    assert f"{unset}={changed[unset]}" in problem
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        assert name not in problem.rpartition("unset ")[2]


@pytest.mark.parametrize(
    "command", [cli.train, cli.prepare, cli.evaluate, cli.prefer], ids=lambda command: command.__name__
)
def test_a_command_with_left_over_variables_ends_with_2_and_one_line(
    command: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in REQUIRED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    manifests = {cli.evaluate: "--test_manifest", cli.prefer: "--manifest"}
    options = ["--output_dir", "out", manifests[command], "none.jsonl"] if command in manifests else []
    assert command(options) == 2  # type: ignore[operator]
    captured = capsys.readouterr()
    missing = "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are missing"
    assert captured.err == f"error: {advice('RANK=0', missing, 'RANK')}\n"
    assert captured.out == ""
