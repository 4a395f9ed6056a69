"""A run that is made longer: what equals a run planned so from the start, and the learning rate where it goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from conftest import read_metrics, speech_sample, write_manifest
from launcher import RANDOM, run_script
from safetensors.torch import load_file

from higgs_ds.common.errors import EXIT_BAD_INPUT

STEPS_PER_EPOCH = 3


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clips = [speech_sample(f"Clip {i}.", f"anna_0{i}.flac", duration=0.3 + i / 10) for i in range(6)]
    return write_manifest(tmp_path_factory.mktemp("longer") / "clips.jsonl", clips)


def train(manifest: Path, folder: Path, more: str) -> subprocess.CompletedProcess[str]:
    line = (
        f"--train_manifest {manifest} --precision fp32 --batch_size 1 --grad_accum 2 --lr 1e-3 --log_steps 1 "
        f"--save_steps {STEPS_PER_EPOCH} --val_split 0 --no_report --resume auto --output_dir run {more}"
    )
    return run_script("train", [*RANDOM, *line.split()], folder)


def assert_same_runs(expected: Path, found: Path) -> None:
    wanted, tensors = (load_file(run / "lora_adapters" / "adapter_model.safetensors") for run in (expected, found))
    assert wanted.keys() == tensors.keys()
    assert all(tensor.equal(tensors[name]) for name, tensor in wanted.items())
    lines = [
        [{key: value for key, value in line.items() if "loss" in key or key in ("step", "lr")} for line in log]
        for log in map(read_metrics, (expected, found))
    ]
    assert lines[0] == lines[1]


# Schedule with its options: of the run that is planned longer, and of the one that is made longer. The warm-up is a
# fraction of the steps that were planned at first.
SCHEDULES = {
    "constant": ("", ""),
    "constant_with_warmup": ("--warmup_ratio 0.34", "--warmup_ratio 0.67"),  # two steps
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_epochs_equal_one_that_is_made_two(tmp_path: Path, manifest: Path, schedule: str) -> None:
    planned, extended = tmp_path / "planned", tmp_path / "extended"
    planned.mkdir()
    extended.mkdir()
    options = [f"--lr_scheduler_type {schedule} {more}" for more in SCHEDULES[schedule]]
    assert train(manifest, planned, f"{options[0]} --epochs 2").returncode == 0
    assert train(manifest, extended, f"{options[1]} --epochs 1").returncode == 0
    done = train(manifest, extended, f"{options[1]} --epochs 2")
    assert done.returncode == 0
    assert "made longer, from 3 to 6 steps" in done.stdout
    assert "of step 4 is 0.001, and goes on as before" in done.stdout
    assert_same_runs(planned / "run", extended / "run")


def test_before_its_decay_warmup_stable_decay_goes_on(tmp_path: Path, manifest: Path) -> None:
    """Three epochs with a decay in the last three steps; and two with a decay in the last two, left at the third."""
    planned, extended, longer = (tmp_path / name for name in ("planned", "extended", "longer"))
    for folder in (planned, extended, longer):
        folder.mkdir()
    schedule = "--lr_scheduler_type warmup_stable_decay --lr_decay_ratio 0.23"
    assert train(manifest, planned, f"{schedule} --warmup_ratio 0.12 --epochs 3").returncode == 0
    assert train(manifest, extended, f"{schedule} --warmup_ratio 0.17 --epochs 2").returncode == 0
    checkpoint = extended / "run" / "checkpoint-3"
    done = train(manifest, longer, f"{schedule} --warmup_ratio 0.17 --epochs 3 --resume {checkpoint}")
    assert done.returncode == 0, done.stderr
    assert "from 6 to 9 steps" in done.stdout
    expected = {line["step"]: line for line in read_metrics(planned / "run")}
    for line in read_metrics(longer / "run"):
        assert line["lr"] == expected[line["step"]]["lr"]
        assert line["train/loss"] == expected[line["step"]]["train/loss"]
    tensors = [load_file(run / "run" / "lora_adapters" / "adapter_model.safetensors") for run in (planned, longer)]
    assert all(tensor.equal(tensors[1][name]) for name, tensor in tensors[0].items())


def test_cosine_is_laid_anew(tmp_path: Path, manifest: Path) -> None:
    assert train(manifest, tmp_path, "--warmup_ratio 0 --epochs 1").returncode == 0
    done = train(manifest, tmp_path, "--warmup_ratio 0 --epochs 2")
    assert done.returncode == 0
    assert "from 3 to 6 steps; the learning rate (cosine) of step 4 is 0.0005, and was to be 0\n" in done.stdout
    rates = [line["lr"] for line in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([1e-3, 7.5e-4, 2.5e-4, 5e-4, 2.5e-4, 6.6987e-5], rel=1e-4)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert (state["step"], state["total_steps"], state["finished"]) == (6, 6, True)


def test_a_run_cannot_be_made_shorter(tmp_path: Path, manifest: Path) -> None:
    assert train(manifest, tmp_path, "--epochs 2").returncode == 0
    before = (tmp_path / "run" / "trainer_state.json").read_text()
    done = train(manifest, tmp_path, "--epochs 1")
    assert done.returncode == EXIT_BAD_INPUT
    assert "is of a run of 6 steps, but this one has 3; --epochs and --max_steps can make a run longer" in done.stderr
    assert (tmp_path / "run" / "trainer_state.json").read_text() == before
