"""How often a run validates, saves and speaks where no option says so, and what is said of a run of few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import read_metrics, speech_sample, write_manifest
from launcher import train_runs

from higgs_ds.data.sampler import WindowSampler
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.train import TrainOptions
from higgs_ds.training.intervals import few_steps_warning, is_due, with_intervals


def times(every: int | None, total_steps: int) -> int:
    """Count how often something is done, the last step included."""
    return sum(is_due(step, every) or step == total_steps for step in range(1, total_steps + 1))


@pytest.mark.parametrize("total_steps", [1, 9, 12, 15, 99, 100, 333, 1000, 1001, 2500, 9999])
def test_about_ten_in_a_run_of_any_length(total_steps: int) -> None:
    run = with_intervals(TrainOptions().replace(samples=True), total_steps).run
    few = min(total_steps, 7)
    assert few <= times(run.save_steps, total_steps) <= 15
    assert few <= times(run.sample_steps, total_steps) <= 15
    assert few <= times(run.val_steps, total_steps) <= max(15, 1 + total_steps // 100)
    assert few <= times(run.log_steps, total_steps) <= max(15, 1 + total_steps // 10)
    assert run.save_steps is not None
    assert is_due(run.save_steps, run.val_steps)  # a validation that is the best may have a checkpoint
    full = with_intervals(TrainOptions().replace(finetune="full"), total_steps).run
    assert min(2, total_steps) <= times(full.save_steps, total_steps) <= 3 + total_steps // 1000


def test_what_is_given_stays() -> None:
    given = parse_train_options("--log_steps 3 --val_steps 70 --save_steps 500 --sample_steps 40".split())[0]
    for total_steps in (1, 12, 100_000):
        assert with_intervals(given, total_steps) == given
    assert with_intervals(TrainOptions(), 12).run.sample_steps is None
    long = with_intervals(TrainOptions().replace(samples=True), 100_000).run
    assert (long.log_steps, long.val_steps, long.save_steps, long.sample_steps) == (10, 100, 1000, 1000)
    recorded = with_intervals(TrainOptions(), 12)
    assert with_intervals(recorded, 5000) == recorded  # settings.json, read by --config


@pytest.mark.parametrize(("samples", "more"), [(95, ""), (95, "--epochs 1 --grad_accum 1"), (30, ""), (3, "")])
def test_few_steps_are_warned_of_with_what_helps(samples: int, more: str) -> None:
    options, _ = parse_train_options(["--train_manifest", "clips", *more.split()])
    optim = options.optim

    def sampler(grad_accum: int) -> WindowSampler:
        return WindowSampler([100] * samples, optim.batch_size, grad_accum, 0, 1, seed=1)

    here = sampler(optim.grad_accum)
    steps = here.num_steps(optim.epochs)
    warning = few_steps_warning(options, here, steps)
    assert warning is not None
    assert warning.startswith(f"warning: {steps} step")
    assert f"({samples} training samples, {optim.epochs} epoch" in warning
    epochs, made = map(int, re.findall(r"--epochs (\d+) makes about (\d+)", warning)[0])
    assert here.num_steps(epochs) == made >= 100 > here.num_steps(epochs - 1)
    smaller = re.findall(r"--grad_accum 1 makes (\d+), of (\d+) samples each", warning)
    expected = (str(sampler(1).num_steps(optim.epochs)), str(sampler(1).window_size))
    assert smaller == ([expected] if optim.grad_accum > 1 else [])


def test_nobody_is_warned_who_has_chosen() -> None:
    sampler = WindowSampler([100] * 95, 2, 8, 0, 1, seed=1)
    for argv, steps in (
        (["--train_manifest", "clips", "--max_steps", "12"], 12),
        (["--train_manifest", "clips", "--epochs", "17"], 102),
        ([], 12),  # the built-in samples, to try the trainer out
    ):
        assert few_steps_warning(parse_train_options(argv)[0], sampler, steps) is None


STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without any interval, and the same command once more; then made longer."""
    root = tmp_path_factory.mktemp("intervals")
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 20) for i in range(4)]
    manifest = write_manifest(root / "clips.jsonl", clips)
    line = (
        f"--train_manifest {manifest} --precision fp32 --batch_size 1 --grad_accum 1 --val_split 0.3 --samples "
        "--num_samples 1 --lora_targets attention --resume auto --output_dir"
    )
    once = [*line.split(), str(root / "run"), "--max_steps", str(STEPS)]
    train_runs(1, [once])
    (root / "first.json").write_bytes((root / "run" / "settings.json").read_bytes())
    (root / "first.jsonl").write_bytes((root / "run" / "metrics.jsonl").read_bytes())
    train_runs(1, [once, [*once[:-1], str(2 * STEPS)]])
    return root


@pytest.mark.slow
def test_a_run_without_intervals(run: Path) -> None:
    """Each step of twelve is logged, validated, saved and spoken, and the base speaks before the first."""
    settings = json.loads((run / "first.json").read_text())
    assert [settings[f"{what}_steps"] for what in ("log", "val", "save", "sample")] == [1, 1, 1, 1]
    lines = [json.loads(line) for line in (run / "first.jsonl").read_text().splitlines()]
    for key in ("train/loss", "val/loss"):
        assert [line["step"] for line in lines if key in line] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in lines if "sample/stop_rate" in line] == [*range(STEPS + 1)]
    spoken = {path.name for path in (run / "run" / "samples").glob("step-*")}
    assert "step-0" in spoken


@pytest.mark.slow
def test_the_same_command_changes_nothing_and_a_longer_run_has_its_own_intervals(run: Path) -> None:
    lines = read_metrics(run / "run")
    assert (run / "first.jsonl").read_text().splitlines() == [json.dumps(line) for line in lines if line["step"] <= 12]
    settings = json.loads((run / "run" / "settings.json").read_text())
    assert [settings[f"{what}_steps"] for what in ("log", "val", "save", "sample")] == [2, 2, 2, 2]
    later = [14, 16, 18, 20, 22, 24]
    for key in ("train/loss", "val/loss", "sample/stop_rate"):
        assert [line["step"] for line in lines if key in line and line["step"] > STEPS] == later
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in (run / "run").glob("checkpoint-*"))
    assert steps == [*range(1, STEPS + 1), *later]
