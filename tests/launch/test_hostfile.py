"""`deepspeed --hostfile` over two addresses of this machine, reached by ssh, each with its own launcher."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics
from launcher import RANDOM, free_port, overriding, train_runs
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name) for name in ("sshd", "ssh-keygen", "pdsh")),
        reason="needs root, and openssh-server, openssh-client and pdsh installed",
    ),
]
HOSTS = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def ssh_path(tmp_path: Path) -> Iterator[str]:
    """A PATH with an `ssh` that reaches this machine without a password, through its own server and keys."""
    port, bin_folder = free_port(), tmp_path / "bin"
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd requires it
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 0.0.0.0\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/client.pub\n"
        "PermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host *\n  Port {port}\n  IdentityFile {tmp_path}/client\n  User {getpass.getuser()}\n  LogLevel ERROR\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
    )
    bin_folder.mkdir()
    (bin_folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
    (bin_folder / "ssh").chmod(0o755)
    server = subprocess.Popen([str(shutil.which("sshd")), "-D", "-e", "-f", tmp_path / "sshd_config"])
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((HOSTS[0], port)) == 0:
                break
        time.sleep(0.05)
    yield f"{bin_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server.terminate()
    server.wait(timeout=20)


def test_two_hosts(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], cache_dir: Path, ssh_path: str
) -> None:
    def options(folder: Path) -> list[str]:
        return (
            f"--deepspeed {ds_file(2)} --output_dir {folder} --cache_dir {cache_dir} --train_manifest {mixed_manifest} "
            "--precision fp32 --allow_text_targets --batch_size 1 --grad_accum 2 --max_steps 3 --log_steps 1 --lr 1e-3"
        ).split()

    train_runs(2, [options(tmp_path / "local")])
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    launcher = ["deepspeed", "--hostfile", tmp_path / "hosts", "--master_addr", HOSTS[0], "--master_port", free_port()]
    done = subprocess.run(
        [
            *map(str, launcher),
            str(PROJECT / "launch" / "train.py"),
            *overriding([*RANDOM, *options(tmp_path / "hosts-run")]),
        ],
        env=os.environ | {"PATH": ssh_path, "OMP_NUM_THREADS": "1"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {host for host in HOSTS if f"{host}: " in done.stdout + done.stderr} == set(HOSTS)
    losses = [[line.get("train/loss") for line in read_metrics(tmp_path / name)] for name in ("local", "hosts-run")]
    assert losses[0] == losses[1]
    expected, found = (
        load_file(tmp_path / name / "lora_adapters" / "adapter_model.safetensors") for name in ("local", "hosts-run")
    )
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())
