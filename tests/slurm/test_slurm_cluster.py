"""A real Slurm cluster of two nodes on this machine: the batch script trains, is stopped, requeued and completes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged")),
        reason="needs root, and slurm-wlm and munge installed",
    ),
]
NODES = ("n1", "n2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=6
KillWait=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES
"""


class Cluster:
    """Slurm daemons of this test, in a folder of its own, stopped at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        (root / "state").mkdir()
        (root / "munge.key").write_bytes(os.urandom(128))
        (root / "munge.key").chmod(0o400)
        root.chmod(0o755)
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            for probe in (a, b, c):
                probe.bind(("127.0.0.1", 0))
            ports = [probe.getsockname()[1] for probe in (a, b, c)]
        conf = CONF.format(root=root, host=socket.gethostname().split(".")[0], ports=ports)
        (root / "slurm.conf").write_text(conf)

    def start(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.root / name}" for option, name in files.items()]
        self.run("munged", "--foreground", "--force", f"--log-file={self.root}/munged.log", *options)
        wait_for(lambda: (self.root / "munge.socket").exists(), "munged")
        self.run("slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], "the nodes")

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-D", "-N", node, name=node)

    def run(self, *command: str, name: str | None = None) -> None:
        with (self.root / f"{name or command[0]}.out").open("ab") as out:
            self.daemons[name or command[0]] = subprocess.Popen(command, env=self.env, stdout=out, stderr=out)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True).stdout.strip()

    def submit(self, output_dir: Path, *options: str) -> str:
        """Queue the project's batch script without GPUs; return the job's number."""
        submitted = subprocess.run(
            [
                "sbatch", "--parsable", "--gres=none", "--cpus-per-task=1", f"--output={output_dir}.log",
                str(PROJECT / "launch" / "slurm" / "train.sbatch"), *options,
            ],
            env=self.env | {
                "OUTPUT_DIR": str(output_dir), "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
            },
            cwd=PROJECT, capture_output=True, text=True,
        )  # fmt: skip
        assert submitted.returncode == 0, submitted.stderr
        return submitted.stdout.strip()

    def state(self, job: str) -> str:
        return self.ask("squeue", "-h", "-j", job, "-t", "all", "-o", "%T")

    def stop(self) -> None:
        self.ask("scancel", "--state=RUNNING", "--full")
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def options(base: Path, mixed_manifest: Path) -> list[str]:
    return (
        f"--precision fp32 --base_ckpt {base} --train_manifest {mixed_manifest} --allow_text_targets --batch_size 1 "
        "--grad_accum 1 --max_steps 60 --lr 1e-3 --log_steps 1 --val_steps 20 --save_steps 10"
    ).split()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "undisturbed"
    ends_right(cluster, cluster.submit(folder, *options), folder)
    return folder


def ends_right(cluster: Cluster, job: str, folder: Path) -> None:
    wait_for(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), f"job {job}")
    log = Path(f"{folder}.log").read_text()
    assert cluster.state(job) == "COMPLETED", log[-4000:]
    steps = [line["step"] for line in read_metrics(folder) if "val/loss" not in line]
    assert steps == list(range(1, 61))


def under_way(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() and len(read_metrics(folder)) >= 15


def same_adapters(folder: Path, other: Path) -> bool:
    name = "lora_adapters/adapter_model.safetensors"
    tensors, others = load_file(folder / name), load_file(other / name)
    return tensors.keys() == others.keys() and all(tensor.equal(others[key]) for key, tensor in tensors.items())


def rank_process(job: str, rank: str) -> int:
    """Return the id of the process that srun started as this rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_training = "launch/train.py" in (folder / "cmdline").read_text()
            if is_training and wanted <= set((folder / "environ").read_text().split("\0")):
                return int(folder.name)
    raise LookupError(f"job {job} has no rank {rank}")


def test_trains_on_two_nodes(undisturbed: Path) -> None:
    log = Path(f"{undisturbed}.log").read_text()
    assert "x 1 accumulated x 2 ranks" in log
    assert "\ntime      the job's time limit is in 24.0 h; " in log


@pytest.mark.parametrize("how", ["scancel --signal=USR1", "scontrol requeue"])
def test_stopped_job_goes_on(cluster: Cluster, options: list[str], undisturbed: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    job = cluster.submit(folder, *options)
    wait_for(lambda: under_way(folder), "the first steps")
    cluster.ask(*how.split(), job)
    wait_for(lambda: "\nresumed " in Path(f"{folder}.log").read_text(), "the job to resume")
    ends_right(cluster, job, folder)
    assert same_adapters(folder, undisturbed)


def test_job_of_a_lost_node_goes_on(cluster: Cluster, options: list[str], undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = cluster.submit(folder, *options)
    wait_for(lambda: under_way(folder), "the first steps")
    # The node no longer responds: neither its daemon nor its rank. The other rank waits.
    lost = rank_process(job, "1")
    os.kill(lost, signal.SIGSTOP)
    cluster.daemons["n2"].kill()
    cluster.daemons["n2"].wait()
    wait_for(lambda: cluster.state(job) == "PENDING", "the job to be requeued")
    os.kill(lost, signal.SIGKILL)
    cluster.start_node("n2")
    wait_for(lambda: "\nresumed " in Path(f"{folder}.log").read_text(), "the job to resume")
    ends_right(cluster, job, folder)
    assert same_adapters(folder, undisturbed)
