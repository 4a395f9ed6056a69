"""Signals and Ctrl-C: what each stops, when, and with which exit code; what is left, and what a resumed run gives."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
from conftest import read_metrics, speech_sample, write_manifest
from launcher import RANDOM, overriding, run_code, run_script
from safetensors.torch import load_file

from higgs_ds.model.loss import LossWeights, Totals
from higgs_ds.reporting.metrics_log import MetricsLog
from higgs_ds.training import signals as stop_signals
from higgs_ds.training.objectives import Supervised
from higgs_ds.training.signals import StopSignals
from higgs_ds.training.validation import validate


class CountingEngine:
    """Counts every batch as one target with a loss of 1 in each part."""

    weights = LossWeights.of(1, 1, 8, None)
    objective = Supervised(weights)

    def __init__(self, keeps_average: bool = False) -> None:
        self.batches, self.keeps_average, self.averaged = 0, keeps_average, 0

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        self.averaged += 1
        yield
        self.averaged -= 1

    def evaluate(self, batches: Iterable[object]) -> Totals:
        self.batches = sum(1 for _ in batches)
        seen = torch.full((11,), float(self.batches))
        return Totals(seen[:9], seen[:9], seen, seen[:0])


class Samples:
    """Four samples of one manifest; a signal comes while the second is fetched, if `number` is given."""

    manifests: ClassVar[dict[str, range]] = {}

    def __init__(self, number: int | None) -> None:
        self.number = number

    def __len__(self) -> int:
        return 4

    def batch(self, indices: list[int]) -> list[int]:
        if self.number and indices == [1]:
            os.kill(os.getpid(), self.number)
        return indices


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_validation_at_the_next_batch(number: int) -> None:
    engine = CountingEngine()
    handler = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.stop_reason() is None
        assert validate(engine, Samples(number), 1, signals) is None
        assert engine.batches == 2
        assert signals.stop_reason() == signal.Signals(number).name
    assert signal.getsignal(number) == handler


def test_validation_without_a_signal_covers_all_samples() -> None:
    for keeps_average in (False, True):
        with StopSignals() as signals:
            values = validate(CountingEngine(keeps_average), Samples(None), 1, signals)
        assert values is not None
        assert {key: value for key, value in values.items() if key.endswith("/audio_loss")} == (
            {"val/audio_loss": 1} | ({"val_ema/audio_loss": 1} if keeps_average else {})
        )


class SignalInTheSecondPass(Samples):
    def batch(self, indices: list[int]) -> list[int]:
        self.number = signal.SIGTERM if self.is_second else None
        self.is_second |= indices == [3]
        return super().batch(indices)

    is_second = False


def test_a_signal_while_averages_are_validated() -> None:
    """The weights are in place again, and there is no half of a validation."""
    engine = CountingEngine(keeps_average=True)
    with StopSignals() as signals:
        assert validate(engine, SignalInTheSecondPass(None), 1, signals) is None
    assert (engine.batches, engine.averaged) == (2, 0)


@pytest.mark.parametrize(
    ("again", "left"),
    [
        ([], ["train/loss", "val/loss", "eval/stop_rate"]),
        (["val/loss"], ["train/loss", "eval/stop_rate"]),
        (["eval/stop_rate"], ["train/loss", "val/loss"]),
    ],
)
def test_what_is_measured_again_is_not_written_twice(tmp_path: Path, again: list[str], left: list[str]) -> None:
    lines = [{"step": 2, name: 1.0} for name in ("train/loss", "val/loss", "eval/stop_rate")]
    lines.append({"step": 3, "train/loss": 1.0})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    MetricsLog(tmp_path, 2, 6, again).close()
    assert [list(json.loads(line))[1] for line in path.read_text().splitlines()] == left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.stop_reason() is None
            assert signal.getsignal(number) == signal.SIG_IGN
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_interrupts_unless_it_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on a Ctrl-C that the terminal has sent to all processes as well."""
    clock = [0.0]
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: clock[0])
    with StopSignals() as signals:
        try:
            for clock[0] in (10.0, 10.1, 10.9):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:  # would end pytest
            pytest.fail(f"interrupted after {clock[0] - 10} s")
        assert signals.stop_reason() == "SIGINT"
        clock[0] = 11.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_outside_the_main_thread_signals_keep_their_effect() -> None:
    reasons = []

    def train() -> None:
        with StopSignals() as signals:
            reasons.append((signal.getsignal(signal.SIGINT), signals.stop_reason()))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reasons == [(signal.default_int_handler, None)]


# Trains in this process, with a signal during a step or wherever else ACTION is called.
SIGNALLED = """
import os, signal, time
import forks
from higgs_ds import cli
from higgs_ds.common.process import run_command
from higgs_ds.training.engine import Engine

def send(number):
    os.kill(os.getpid(), number)

steps, compute = [], Engine.train_step

def train_step(self, batches):
    steps.append(compute(self, batches))
    if len(steps) == 3:
        action()
    return steps[-1]

def run():
    run_command(lambda: cli.train(OPTIONS))

Engine.train_step = train_step
"""
END = "error: interrupted; what was written before is complete\n"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Six steps with dropout, and a checkpoint every second step."""
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 10) for i in range(6)]
    manifest = write_manifest(tmp_path_factory.mktemp("signals") / "clips.jsonl", clips)
    line = (
        f"--train_manifest {manifest} --deepspeed zero2.json --precision fp32 --batch_size 1 --grad_accum 2 --lr 1e-3 "
        "--max_steps 6 --log_steps 1 --val_steps 2 --save_steps 2 --no_report --quiet --output_dir run --resume auto"
    )
    return overriding([*RANDOM, *line.split()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_script("train", options, folder).returncode == 0
    return folder


def signalled(action: str, options: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Train with an action in the third step, given as Python expressions."""
    return run_code(f"OPTIONS = {options}\n{SIGNALLED}\ndef action():\n    {action}\nrun()\n", folder)


def assert_same_end(expected: Path, found: Path) -> None:
    lines = [
        [
            {key: value for key, value in line.items() if "loss" in key or key in ("step", "lr", "grad_norm")}
            for line in log
        ]
        for log in (read_metrics(expected / "run"), read_metrics(found / "run"))
    ]
    assert [line["step"] for line in lines[0]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert lines[0] == lines[1]
    assert_same_tensors(expected / "run" / "checkpoint-6", found / "run" / "checkpoint-6")


def assert_same_tensors(expected: Path, found: Path) -> None:
    names = sorted(str(path.relative_to(expected)) for path in expected.rglob("*.safetensors"))
    assert "optimizer.safetensors" in names
    for name in names:
        wanted, tensors = load_file(expected / name), load_file(found / name)
        assert wanted.keys() == tensors.keys()
        assert all(tensor.equal(tensors[key]) for key, tensor in wanted.items())


def left_over(folder: Path) -> list[str]:
    """Locks, and temporary files and folders."""
    return [path.name for path in folder.rglob("*") if "lock" in path.name or ".tmp" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "name"),
    [
        ("send(signal.SIGINT)", "SIGINT"),
        ("send(signal.SIGINT); time.sleep(0.5); send(signal.SIGINT)", "SIGINT"),  # as one: see AGAIN_AFTER_S
        ("send(signal.SIGHUP)", "SIGHUP"),
    ],
    ids=["ctrl_c", "two_at_once", "hang_up"],
)
def test_one_signal_saves_a_checkpoint_and_a_resumed_run_is_as_if_never_stopped(
    action: str, name: str, options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    done = signalled(action, overriding([*options, "--save_steps", "100"]), tmp_path)
    assert done.returncode == 6, done.stderr
    *before, last = done.stderr.splitlines()
    assert last == f"error: stopped by {name} at step 3 of 6; a checkpoint is saved in run. Resume with --resume auto"
    note = "Ctrl-C: the run ends after this step, and saves a checkpoint; press Ctrl-C again to end it at once"
    assert [line for line in before if line] == ([note] if name == "SIGINT" else [])
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert left_over(tmp_path) == []
    resumed = run_script("train", options, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_under_nohup_or_in_a_background_a_run_completes(
    name: str, options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """A shell ignores SIGINT for a command in its background, and nohup SIGHUP; both are inherited."""
    ignored = f"signal.signal(signal.{name}, signal.SIG_IGN)"
    code = f"OPTIONS = {options}\n{SIGNALLED}\n{ignored}\ndef action():\n    send(signal.{name})\nrun()\n"
    done = run_code(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_long_step_and_leaves_the_last_checkpoint(
    options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    done = signalled("send(signal.SIGINT); time.sleep(1.2); send(signal.SIGINT); time.sleep(60)", options, tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith(f"press Ctrl-C again to end it at once\n{END}")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert_same_tensors(uninterrupted / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert left_over(tmp_path) == []
    resumed = run_script("train", options, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.slow
def test_a_terminal_interrupts_both_ranks_and_one_checkpoint_is_saved(options: list[str], tmp_path: Path) -> None:
    code = """
def action():
    send(signal.SIGINT)

from pathlib import Path
from typing import ClassVar
print(forks.wait(forks.start(2, forks.training(OPTIONS), Path("log")), 200))
"""
    done = run_code(
        f"OPTIONS = {[*options, '--save_steps', '100', '--grad_accum', '1']}\n{SIGNALLED}\n{code}", tmp_path
    )
    log = (tmp_path / "log").read_text()
    assert done.stdout == "[6, 6]\n", (done.stderr, log)
    assert (
        log.count("error: ") == log.count("error: stopped by SIGINT at step 3 of 6; a checkpoint is saved in run") == 1
    )
    assert "Traceback" not in log
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert left_over(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        ("higgs_ds.data.preparation", "survey", signal.SIGINT),  # samples are checked
        ("higgs_ds.data.encode", "_encode_one", signal.SIGINT),
        ("higgs_ds.training.loading", "trained_parameters", signal.SIGINT),  # the model is loaded
        ("higgs_ds.training.loading", "load_base", signal.SIGINT),
        ("higgs_ds.training.loading", "load_base", signal.SIGTERM),
        ("higgs_ds.data.encode", "_encode_one", signal.SIGHUP),
    ],
    ids=["checking", "encoding", "table", "loading", "terminated", "hang_up"],
)
def test_a_signal_before_the_first_step_is_one_line_and_leaves_nothing(
    module: str, name: str, number: int, options: list[str], tmp_path: Path
) -> None:
    code = f"""
import {module} as module
original = module.{name}

def interrupted(*args, **kwargs):
    send({number})
    return original(*args, **kwargs)

module.{name} = interrupted
run()
"""
    done = run_code(f"OPTIONS = {[*options, '--cache_dir', 'cache']}\n{SIGNALLED}\n{code}", tmp_path)
    end = END if number == signal.SIGINT else END.replace(";", f" by {signal.Signals(number).name};")
    assert (done.returncode, done.stderr) == (128 + number, end)
    assert left_over(tmp_path) == []
    assert not (tmp_path / "run").exists()
    assert run_script("train", [*options, "--cache_dir", "cache"], tmp_path).returncode == 0


PREPARE_IN_WORKERS = """
if __name__ == "__main__":
    import sys
    from higgs_ds import cli
    from higgs_ds.common.process import run_command
    from higgs_ds.data import encode

    encode.WORTH_A_WORKER_S = 0.1
    run_command(lambda: cli.prepare(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start_of_workers", "encoding"])
def test_ctrl_c_in_a_terminal_ends_encoding_workers_without_tracebacks(moment: str, base: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to all processes of the command."""
    clips = [
        speech_sample(f"Clip {i}.", f"{who}_0{clip}.flac", offset=i / 10, duration=0.5)
        for who in ("anna", "ben", "carla")
        for clip in range(4)
        for i in range(8)
    ]
    script, manifest = tmp_path / "prepare.py", write_manifest(tmp_path / "clips.jsonl", clips)
    script.write_text(PREPARE_IN_WORKERS)
    options = f"--train_manifest {manifest} --base_ckpt {base} --cache_dir {tmp_path / 'cache'} --num_workers 2".split()
    process = subprocess.Popen(
        [sys.executable, str(script), *options], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    parent, workers = psutil.Process(process.pid), []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        workers = [child for child in parent.children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
        if len(workers) == 2 and (
            moment == "start_of_workers" or list((tmp_path / "cache").glob("codes/*/*.safetensors"))
        ):
            break
        time.sleep(0.02)
    if moment == "start_of_workers":
        time.sleep(1)  # they import
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    note = "\nCtrl-C: the run ends as soon as the clips in work are stored; press Ctrl-C again to end it at once\n"
    assert (process.returncode, errors) == (130, note + END)
    _, running = psutil.wait_procs(workers, timeout=10)
    assert not running
    assert len(list((tmp_path / "cache").glob("codes/*/*.safetensors"))) < len(clips)
    assert left_over(tmp_path / "cache") == []
