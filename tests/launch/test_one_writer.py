"""Two commands with one output: the second is refused while the first lives, and takes over once it is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, read_metrics, speech_sample, write_manifest
from launcher import RANDOM, run_code, run_script, train_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from pathlib import Path
from higgs_ds.common.lock import OutputLock
OutputLock(Path(sys.argv[1]), "--output of another command").acquire(print)
print("held", flush=True)
time.sleep(600)
"""
SHORT = [*RANDOM, *"--precision fp32 --grad_accum 1 --batch_size 2 --val_split 0 --no_report --log_steps 1".split()]
# Two commands at the same time, each in a process of its own.
AT_ONCE = """
import os, sys
from higgs_ds import cli
from higgs_ds.common.process import run_command

def start(number, argv):
    pid = os.fork()
    if pid == 0:
        out = os.open(f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        run_command(lambda: getattr(cli, argv[0])(argv[1:]))
    return pid

pids = [start(number, argv) for number, argv in enumerate(COMMANDS)]
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: two adapters, a checkpoint of full fine-tuning, clips of which one is missing."""
    folder = tmp_path_factory.mktemp("made")
    one_step = [*SHORT, "--max_steps", "1"]
    train_runs(
        1,
        [
            *([*one_step, "--seed", str(seed), "--output_dir", str(folder / f"seed-{seed}")] for seed in (1, 2)),
            [*one_step, "--finetune", "full", "--output_dir", str(folder / "full")],
        ],
    )
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.4) for i in range(2)]
    write_manifest(folder / "clips.jsonl", clips)
    write_manifest(folder / "one_missing.jsonl", [*clips, speech_sample("Missing.", "none.flac")])
    return folder


def commands(made: Path, base: Path) -> dict[str, tuple[str, str, list[str]]]:
    """For each kind: the lock of its output, how that is named, and the command line."""
    adapter = f"{made}/seed-1/lora_adapters"
    lines = {
        "train": ("run/.lock", "--output_dir run", f"train {' '.join(SHORT)} --max_steps 1 --output_dir run"),
        "evaluate": (
            "heard/.evaluation.lock", "--output_dir heard",
            f"evaluate --base_model_path {base} --test_manifest {made}/clips.jsonl --output_dir heard",
        ),
        "prefer": (
            "pairs/.preference.lock", "--output_dir pairs",
            f"prefer --base_model_path {base} --manifest {made}/clips.jsonl --output_dir pairs --renderings 2",
        ),
        "merge": (
            ".merged.lock", "--output_path merged",
            f"merge --base_model_path {base} --lora_adapter_path {adapter} --output_path merged --no_verify",
        ),
        "export": (
            ".model.lock", "--output_path model",
            f"export --checkpoint_path {made}/full/checkpoint-1 --base_model_path {base} --output_path model",
        ),
        "convert of a base": (
            ".base.lock", "--output_path base", f"convert --input_path {base} --output_path base --to original",
        ),
        "convert of an adapter": (
            ".adapter.lock", "--output_path adapter",
            f"convert --input_path {adapter} --output_path adapter --to original",
        ),
        "blend": (
            ".blend.lock", "--output_path blend", f"blend {adapter}=0.5 {adapter}=0.5 --output_path blend",
        ),
        "prepare": (
            ".bad.txt.lock", "--skip_bad bad.txt",
            f"prepare --base_ckpt {base} --train_manifest {made}/one_missing.jsonl --skip_bad bad.txt "
            "--cache_dir cache",
        ),
    }  # fmt: skip
    return {kind: (lock, named, line.split()) for kind, (lock, named, line) in lines.items()}


KINDS = [
    "train", "evaluate", "prefer", "merge", "export", "convert of a base", "convert of an adapter", "blend", "prepare",
]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def holders() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for holder in started:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_refused_while_another_process_lives_and_takes_over_once_it_is_killed(
    kind: str, made: Path, base: Path, tmp_path: Path, holders: list[subprocess.Popen[str]]
) -> None:
    lock, named, (name, *options) = commands(made, base)[kind]
    (tmp_path / lock).parent.mkdir(exist_ok=True)
    if kind == "prepare":
        (tmp_path / "bad.txt").write_text("m.jsonl:1: of the other run\n")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / lock)], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    holders.append(holder)
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    before = contents(tmp_path)
    owner = rf"process {holder.pid} on {re.escape(os.uname().nodename)}, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d, "

    refused = run_script(name, options, tmp_path)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert re.fullmatch(
        rf"error: {named}: {owner}is writing there; wait until it has ended, stop it, or choose another path\n",
        refused.stderr,
    )
    assert contents(tmp_path) == before

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = run_script(name, options, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    taken_over = rf"note: {named}: the lock of {owner}is taken over: that process has ended"
    assert len(re.findall(rf"^{taken_over}$", done.stdout + done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if "lock" in path.name or path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", ["merge", "convert of an adapter", "convert of a base"])
def test_of_two_at_once_one_is_written_and_the_other_is_refused(
    kind: str, made: Path, base: Path, tmp_path: Path
) -> None:
    """The second must not report success for a folder that holds the first one's result."""
    first, second = (
        [word.replace("seed-1", f"seed-{seed}") for word in commands(made, base)[kind][2]] for seed in (1, 2)
    )
    output = first[first.index("--output_path") + 1]
    expected = []
    for number, argv in enumerate((first, second)):
        alone = tmp_path / f"alone-{number}"
        alone.mkdir()
        assert run_script(argv[0], argv[1:], alone).returncode == 0
        expected.append(alone / output)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        done = run_code(f"COMMANDS = {[first, second]}\n{AT_ONCE}", folder)
        logs = [(folder / f"{number}.log").read_text() for number in (0, 1)]
        codes = [int(code) for code in done.stdout.split()]
        assert sorted(codes) == [0, 2], (done, logs)
        loser = logs[codes.index(2)]
        assert loser.count("error: ") == 1
        assert "Traceback" not in loser
        written = expected[codes.index(0)]
        assert {path.name for path in written.iterdir()} == {path.name for path in (folder / output).iterdir()}
        for path in written.rglob("*.safetensors"):
            found, wanted = load_file(folder / output / path.relative_to(written)), load_file(path)
            assert found.keys() == wanted.keys()
            assert all(tensor.equal(wanted[name]) for name, tensor in found.items())
        names = {path.name for path in folder.iterdir()}
        assert names == {"code.py", "0.log", "1.log", output}


# The first run is stopped (SIGSTOP) between two steps, so that the second cannot come too late.
TWO_TRAININGS = """
import os, signal, time
from pathlib import Path
import forks

def logged():
    path = Path("run/metrics.jsonl")
    return len(path.read_text().splitlines()) if path.is_file() else 0

first = forks.start(1, forks.training(OPTIONS), Path("first.log"))
while logged() < 3:
    time.sleep(0.01)
os.kill(first[0], signal.SIGSTOP)
before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
second = forks.wait(forks.start(1, forks.training([*OPTIONS, "--resume", "auto"]), Path("second.log")), 100)
assert not os.waitpid(first[0], os.WNOHANG)[0]
assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
os.kill(first[0], END)
print(first[0], second, forks.wait(first, 200))
"""


@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL], ids=["goes_on", "is_killed"])
def test_a_second_training_is_refused_and_leaves_the_first_alone(end: signal.Signals, tmp_path: Path) -> None:
    """If the first is killed after all, a third one resumes it."""
    options = [*SHORT, *"--max_steps 20 --save_steps 2 --output_dir run --resume auto".split()]
    done = run_code(f"END = {end.value}\nOPTIONS = {options}\n{TWO_TRAININGS}", tmp_path)
    first = 0 if end == signal.SIGCONT else -9
    pid = done.stdout.split()[0]
    assert done.stdout == f"{pid} [2] [{first}]\n", done.stderr
    refusal = (tmp_path / "second.log").read_text()
    assert re.fullmatch(
        rf"error: --output_dir run: process {pid} on \S+, started .{{19}}, is writing there; .*\n", refusal
    )
    if end == signal.SIGKILL:
        assert (tmp_path / "run" / ".lock").exists()
        third = run_script("train", options, tmp_path)
        assert third.returncode == 0, third.stderr
        assert f"note: --output_dir run: the lock of process {pid} on " in third.stdout
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 21))
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["finished"] is True
    assert not (tmp_path / "run" / ".lock").exists()
