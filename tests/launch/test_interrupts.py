"""Ctrl-C in every phase: what is printed, the exit code, what is left, and what a resumed run gives.

The processes are held at a place in the phase, and then signalled as a terminal does: all of the process group at once.
Phases on two ranks are interrupted once, which includes what one rank does while the other waits. On one rank, most are
interrupted twice, while the rank is in a function of C that never returns. Not here, as other tests cover it: one
signal on one rank before and in a step, workers that encode, and one rank alone (training/test_signals.py); all phases
with other signals (misuses.py). A launcher only passes signals on, which does not depend on the phase: each starts
two trainings, which differ in the phase, the number of ranks and the number of signals.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import held
import psutil
import pytest
from conftest import PROJECT, speech_sample, write_manifest
from launcher import RANDOM, free_port, overriding, run_code, train_runs
from safetensors.torch import load_file

from higgs_ds.checkpoints.folder import why_incomplete

pytestmark = pytest.mark.slow

# Phases without anything to wait for: a command ends at once.
AT_ONCE = {
    "checking": "higgs_ds.data.preparation:survey:1",
    "encoding": "higgs_ds.data.encode:_encode_one:2",
    "loading": "higgs_ds.training.loading:load_base:1",
    "merging": "higgs_ds.adapters.merge:write_shard:1",
}
# Phases of a training of four steps, with what the first Ctrl-C prints, and the step of the last checkpoint then.
WAITING = {
    "step": ("higgs_ds.training.engine:Engine.train_step:3", "after this step, and saves a checkpoint", 3),
    "validating": (
        "higgs_ds.training.engine:Engine.evaluate:1", "at the next batch of this validation, and saves a checkpoint", 2,
    ),
    "speaking": ("higgs_ds.training.samples:speak:2", "after the samples, and saves a checkpoint", 2),
    "saving": ("higgs_ds.checkpoints.save:write_shards:1", "as soon as this checkpoint is saved", 2),
    "drawing": ("higgs_ds.reporting.report_page:write_report:2", "after the report, with a checkpoint", 4),
}  # fmt: skip
MERGE = ["--merge_adapter_with_base"]
BY_RANK_0 = ("merging", "speaking", "saving", "drawing")  # while the others wait for it
END = "interrupted; what was written before is complete"
ADAPTER = Path("run") / "lora_adapters" / "adapter_model.safetensors"
WITHIN_S, AGAIN_WITHIN_S = 10, 2  # on a busy machine

# Starts ranks in a process group of their own, and interrupts them there. Prints exit codes and seconds.
INTERRUPTED = """
import contextlib, json, os, signal, time
from pathlib import Path

import forks
import held
from higgs_ds import cli
from higgs_ds.common.process import run_command
from launcher import free_port, rank_environment

port, pids, here = free_port(), [], Path.cwd()
log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for rank in range(RANKS):
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, pids[0] if pids else 0)
        os.environ.update(rank_environment(rank, RANKS, port))
        os.dup2(log, 1)
        os.dup2(log, 2)
        held.hold(PLACE, here, FOR_EVER)
        run_command(lambda: getattr(cli, COMMAND)(OPTIONS))
    pids.append(pid)
try:
    sent_at = held.interrupt(pids[0], here, HELD_RANKS, here / "log", NOTE, FOR_EVER)
    codes = forks.wait(pids, 30)
    print(json.dumps([codes, time.monotonic() - sent_at]))
finally:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pids[0], signal.SIGKILL)
"""


def interrupted(
    command: str, options: list[str], folder: Path, place: str, ranks: int, held_ranks: int, note: str, twice: bool
) -> str:
    """Interrupt a command, and check its exit codes, when it ends and that no process is left. Return its output."""
    values = {
        "COMMAND": command, "OPTIONS": options, "PLACE": place, "RANKS": ranks, "HELD_RANKS": held_ranks, "NOTE": note,
        "FOR_EVER": twice,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    done = run_code("".join(f"{name} = {value!r}\n" for name, value in values.items()) + INTERRUPTED, folder)
    log = (folder / "log").read_text()
    assert done.returncode == 0, (done.stderr, log)
    codes, seconds = json.loads(done.stdout.splitlines()[-1])
    assert codes == [130 if twice or not note else 6] * ranks, log
    assert seconds < (AGAIN_WITHIN_S if twice else WITHIN_S), log
    assert "Traceback" not in log
    assert not processes_of(folder)
    return log


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a folder."""
    return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four steps with dropout, validations, samples and checkpoints."""
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 10) for i in range(8)]
    manifest = write_manifest(tmp_path_factory.mktemp("interrupts") / "clips.jsonl", clips)
    line = (
        f"--train_manifest {manifest} --deepspeed zero2.json --precision fp32 --batch_size 1 --grad_accum 1 --lr 1e-3 "
        "--max_steps 4 --log_steps 1 --val_steps 2 --val_split 0.25 --save_steps 2 --sample_steps 2 --num_samples 1 "
        "--num_workers 1 --resume auto --output_dir run"
    )
    return overriding([*RANDOM, *line.split()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> dict[int, Path]:
    """The folders of undisturbed runs on one rank and on two."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2)}
    for ranks, folder in folders.items():
        resume(ranks, options, folder)
    return folders


def resume(ranks: int, options: list[str], folder: Path) -> None:
    train_runs(ranks, [[*options, "--output_dir", str(folder / "run")]], report=True)


def assert_same_adapter(expected: Path, found: Path) -> None:
    wanted, tensors = load_file(expected / ADAPTER), load_file(found / ADAPTER)
    assert wanted.keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in wanted.items())


def checkpoints(folder: Path) -> list[int]:
    """Return the steps of the checkpoints, all of which must be complete."""
    found = sorted((folder / "run").glob("checkpoint-*"))
    assert [why_incomplete(path) for path in found] == [None] * len(found)
    return [int(path.name.removeprefix("checkpoint-")) for path in found]


def left_over(folder: Path) -> list[str]:
    """Locks, and temporary files and folders."""
    return [path.name for path in folder.rglob("*") if "lock" in path.name or ".tmp" in path.name]


@pytest.mark.parametrize("phase", AT_ONCE)
def test_two_ranks_end_at_once_where_nothing_is_lost(phase: str, options: list[str], tmp_path: Path) -> None:
    held_ranks = 1 if phase in BY_RANK_0 else 2
    more = MERGE if phase == "merging" else ["--cache_dir", "cache"] if phase in ("checking", "encoding") else []
    log = interrupted("train", [*options, *more], tmp_path, AT_ONCE[phase], 2, held_ranks, "", False)
    assert all(log.count(f"error: rank {rank}: {END}\n") == 1 for rank in range(2))
    assert left_over(tmp_path) == []
    assert len(list(tmp_path.glob("cache/codes/*/*.safetensors"))) == (2 if phase == "encoding" else 0)
    assert checkpoints(tmp_path) == ([2, 4] if phase == "merging" else [])
    assert (tmp_path / "run").exists() == (phase == "merging")


@pytest.mark.parametrize("phase", WAITING)
def test_two_ranks_save_and_a_resumed_run_is_as_if_never_interrupted(
    phase: str, options: list[str], uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    place, note, step = WAITING[phase]
    log = interrupted("train", options, tmp_path, place, 2, 1 if phase in BY_RANK_0 else 2, note, False)
    assert f"Ctrl-C: the run ends {note}; press Ctrl-C again to end it at once\n" in log
    assert log.count("error: ") == log.count(f"error: stopped by SIGINT at step {step} of 4; a checkpoint is") == 1
    assert checkpoints(tmp_path)[-1] == step
    assert left_over(tmp_path) == []
    resume(2, options, tmp_path)
    assert_same_adapter(uninterrupted[2], tmp_path)


@pytest.mark.parametrize(
    ("phase", "ranks"),
    [("loading", 1), ("step", 2), ("validating", 1), ("speaking", 1), ("saving", 1), ("drawing", 1), ("merging", 1)],
)
def test_a_second_ctrl_c_ends_even_what_never_returns(
    phase: str, ranks: int, options: list[str], uninterrupted: dict[int, Path], tmp_path: Path
) -> None:
    place, note, _ = WAITING.get(phase) or (AT_ONCE[phase], "", 0)
    more = MERGE if phase == "merging" else []
    log = interrupted("train", [*options, *more], tmp_path, place, ranks, ranks, note, True)
    assert log.endswith(f"{END}\n")
    saved = {"loading": [], "drawing": [2, 4], "merging": [2, 4], "step": [2]}
    assert checkpoints(tmp_path) == saved.get(phase, [])
    if phase in ("step", "saving"):
        resume(ranks, options, tmp_path)
        assert_same_adapter(uninterrupted[ranks], tmp_path)


@pytest.mark.parametrize("command", ["prepare", "merge", "generate", "evaluate"])
def test_other_commands_end_at_once(
    command: str, options: list[str], uninterrupted: dict[int, Path], base: Path, tmp_path: Path
) -> None:
    manifest = options[options.index("--train_manifest") + 1]
    place, line, ranks = {
        "prepare": (AT_ONCE["encoding"], f"--train_manifest {manifest} --base_ckpt {base} --cache_dir cache", 2),
        "merge": (AT_ONCE["merging"], f"--base_model_path {base} --output_path new", 1),
        "generate": (
            "higgs_ds.speech.generate:speak:1", f"--base_model_path {base} --text Hello. --output new/a.wav", 1,
        ),
        "evaluate": (
            "higgs_ds.speech.held_out:speak:2", f"--base_model_path {base} --test_manifest {manifest} --output_dir new",
            2,
        ),
    }[command]  # fmt: skip
    adapter = ["--lora_adapter_path", str(uninterrupted[1] / ADAPTER.parent)] if command == "merge" else []
    log = interrupted(command, [*line.split(), *adapter], tmp_path, place, ranks, ranks, "", False)
    assert log.count(END) == ranks
    assert left_over(tmp_path) == []
    assert sorted(path.name for path in (tmp_path / "new").glob("*")) == (
        ["0.wav", "1.wav", "reference"] if command == "evaluate" else []
    )


SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc_per_node"],
    "deepspeed": [str(SCRIPTS / "deepspeed"), "--num_gpus"],
}


@pytest.mark.parametrize(
    ("launcher", "ranks", "phase", "twice", "code"),
    [
        ("torchrun", 2, "step", False, 1),
        ("torchrun", 1, "speaking", True, 1),
        ("deepspeed", 2, "saving", False, -signal.SIGINT),
        ("deepspeed", 1, "loading", False, -signal.SIGINT),
    ],
)
def test_under_a_launcher(
    launcher: str,
    ranks: int,
    phase: str,
    twice: bool,
    code: int,
    options: list[str],
    uninterrupted: dict[int, Path],
    tmp_path: Path,
) -> None:
    place, note, step = WAITING.get(phase) or (AT_ONCE[phase], "", 0)
    (tmp_path / "sitecustomize.py").write_text("import held; held.hold_by_environment()\n")
    environment = os.environ | {
        "HELD_AT": place, "HELD_IN": str(tmp_path), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{tmp_path}:{PROJECT / 'tests'}:{PROJECT}", **({"HELD_FOR_EVER": "1"} if twice else {}),
    }  # fmt: skip
    command = [
        *LAUNCHERS[launcher],
        str(ranks),
        "--master_port",
        str(free_port()),
        str(PROJECT / "launch" / "train.py"),
    ]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], cwd=tmp_path, env=environment, stdout=log, stderr=log, process_group=0
        )
    held_ranks = 1 if phase in BY_RANK_0 else ranks
    try:
        sent_at = held.interrupt(process.pid, tmp_path, held_ranks, tmp_path / "log", note, twice)
        assert process.wait(WITHIN_S) == code
        held.wait_until(lambda: not processes_of(tmp_path), WITHIN_S)
    finally:
        for left in processes_of(tmp_path):
            left.kill()
    seconds, output = time.monotonic() - sent_at, (tmp_path / "log").read_text()
    assert seconds < (AGAIN_WITHIN_S if twice else WITHIN_S), output
    assert 'launch/train.py", line' not in output  # of a traceback; the launcher prints one of its own
    if twice or not note:
        assert output.count(END) == ranks
        assert checkpoints(tmp_path) == []
        return
    assert f"error: stopped by SIGINT at step {step} of 4; a checkpoint is saved" in output
    assert checkpoints(tmp_path)[-1] == step
    resume(ranks, options, tmp_path)
    assert_same_adapter(uninterrupted[ranks], tmp_path)
