"""Ranks from the variables that srun sets."""

from __future__ import annotations

import pytest

from higgs_ds.common.rank_variables import slurm_variables

BATCH = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
STEP = BATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-a[003-004,7]", "gpu-a003"),
        ("a1,b[2-3]", "a1"),
    ],
)
def test_ranks_of_a_job_step(nodes: str, first: str) -> None:
    assert slurm_variables(STEP | {"SLURM_STEP_NODELIST": nodes}) == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": first,
        "MASTER_PORT": str(20000 + (4711 * 8 + 2) % 20000),
    }  # fmt: skip


def test_batch_script_has_no_ranks() -> None:
    assert slurm_variables(BATCH) == {}
