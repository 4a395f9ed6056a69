"""When a rank or a launcher ends for any reason, the whole run ends soon, with the cause first and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import PROJECT
from launcher import RANDOM, free_port, overriding

pytestmark = pytest.mark.slow

SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus", "2", "--master_port"],
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc_per_node", "2", "--master_port"],
}
WITHIN_S = 60
# Makes rank 1 fail in its second step. Python imports it at startup, as `sitecustomize`.
FAILING = """
import os
if os.environ.get("RANK") == "1":
    import importlib.abc, sys

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "higgs_ds.training.loop":
                sys.meta_path.remove(self)
                from higgs_ds.training.engine import Engine
                step, steps = Engine.train_step, []

                def failing(self, batches):
                    steps.append(1)
                    if len(steps) == 2:
                        raise {error}
                    return step(self, batches)

                Engine.train_step = failing

    sys.meta_path.insert(0, Finder())
"""


class Launched:
    """A run under a launcher, and every process that it started."""

    def __init__(self, launcher: str, script_options: list[str], output_dir: Path, **environment: str) -> None:
        command = [*LAUNCHERS[launcher], str(free_port()), str(PROJECT / "launch" / "train.py")]
        command += overriding([*RANDOM, *script_options])
        self.output_dir = output_dir
        self.log = output_dir.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
            )
        self.started: list[psutil.Process] = []

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and self.process.poll() is None:
            metrics = self.output_dir / "metrics.jsonl"
            if metrics.is_file() and metrics.read_text().count("\n") >= step:
                break
            time.sleep(0.02)
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        """Return the workers in the order of their ranks."""
        workers = [process for process in self.started if process.environ().get("RANK")]
        outermost = [process for process in workers if not any(process.pid == w.ppid() for w in workers)]
        return sorted(outermost, key=lambda process: int(process.environ()["RANK"]))

    def ended_within(self, seconds: float) -> int:
        """Return the launcher's exit code, after all processes that it started are gone."""
        code = self.process.wait(timeout=seconds)
        _, left = psutil.wait_procs(self.started, timeout=seconds)
        assert not left
        return code


@pytest.fixture
def launched() -> Iterator[Callable[..., Launched]]:
    runs: list[Launched] = []

    def start(*args: object, **environment: str) -> Launched:
        runs.append(Launched(*args, **environment))  # type: ignore[arg-type]
        return runs[-1]

    yield start
    for run in runs:
        for process in [*run.started, run.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        run.process.wait()


def options(manifest: Path, ds_json: Path, output_dir: Path) -> list[str]:
    return (
        f"--deepspeed {ds_json} --output_dir {output_dir} --precision fp32 --train_manifest {manifest} "
        "--allow_text_targets --batch_size 1 --grad_accum 1 --max_steps 5000 --log_steps 1 --val_steps 5000"
    ).split()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_all(
    tmp_path: Path,
    mixed_manifest: Path,
    ds_file: Callable[[int], Path],
    launched: Callable[..., Launched],
    launcher: str,
) -> None:
    run = launched(launcher, options(mixed_manifest, ds_file(2), tmp_path / "run"), tmp_path / "run")
    run.wait_for_step(2)
    run.ranks()[1].kill()
    assert run.ended_within(WITHIN_S) != 0
    assert "another rank has ended" in run.log.read_text()


def test_a_failing_rank_speaks_first(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], launched: Callable[..., Launched]
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAILING.format(error='ZeroDivisionError("of rank 1")'))
    run = launched(
        "deepspeed",
        options(mixed_manifest, ds_file(3), tmp_path / "run"),
        tmp_path / "run",
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert run.ended_within(WITHIN_S + 200) == 1
    log = run.log.read_text()
    cause = log.index("[rank1]: ZeroDivisionError: of rank 1")
    assert "another rank has ended" not in log[:cause]


def test_the_end_of_the_runner_stops_the_ranks_with_a_checkpoint(
    tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path], launched: Callable[..., Launched]
) -> None:
    run = launched("deepspeed", options(mixed_manifest, ds_file(2), tmp_path / "run"), tmp_path / "run")
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGTERM)
    assert run.ended_within(WITHIN_S) != 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = checkpoint.name.removeprefix("checkpoint-")
    assert f"stopped by the end of its launcher at step {step} of 5000" in run.log.read_text()
