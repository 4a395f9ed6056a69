"""TensorBoard's files and an offline W&B run have the metrics and samples of the run; --quiet prints nothing."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import PROJECT, read_metrics
from launcher import RANDOM, free_port, overriding, rank_environment, train_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from higgs_ds.options import compatibility as support
from higgs_ds.options.command_line import parse_train_options

pytestmark = pytest.mark.slow


def options(manifest: Path, ds_json: Path, folder: Path) -> list[str]:
    return (
        f"--deepspeed {ds_json} --output_dir {folder} --precision fp32 --train_manifest {manifest} --lr 1e-3 "
        "--allow_text_targets --val_split 0.34 --batch_size 1 --grad_accum 1 --max_steps 4 --log_steps 1 --val_steps 2 "
        "--save_steps 2"
    ).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """A run on two ranks, then resumed from its first checkpoint, which removes the later lines."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)}
    argv = [*options(mixed_manifest, ds_file(2), folder), "--report_to", "tensorboard", "wandb"]
    argv += ["--sample_steps", "2", "--num_samples", "1"]
    train_runs(2, [argv])
    train_runs(2, [[*argv, "--resume", str(folder / "checkpoint-2")]])
    return folder


def expected(run: Path, step: int) -> dict[str, float]:
    lines = [line for line in read_metrics(run) if line["step"] == step]
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= {key: value for key, value in line.items() if value is not None and key != "step"}
    return merged


def test_tensorboard(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = read_metrics(run)
    for name in ("train/loss", "train/audio_loss/cb7", "val/text_loss", "lr", "grad_norm", "tokens_per_s"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        known = {line["step"]: line[name] for line in lines if line.get(name) is not None}
        assert shown.keys() == known.keys()
        assert all(value == pytest.approx(known[step], rel=1e-6) for step, value in shown.items())


def test_wandb_offline(run: Path) -> None:
    """Both starts are one W&B run, with the last step's values and the settings."""
    identity = json.loads((run / "wandb_run.json").read_text())["id"]
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{identity}") for folder in folders)
    written = b"".join(path.read_bytes() for path in folders[-1].glob("*.wandb"))
    for name, value in expected(run, 4).items():
        assert name.encode() in written
        assert json.dumps(value).encode() in written or repr(value).encode() in written, (name, value)
    assert b"lora_alpha" in written


def test_samples_in_tensorboard(run: Path) -> None:
    """Each sample once, at its step, although the run was resumed between them; and the reference, at the first."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    heard = {tag: {event.step: event for event in events.Audio(tag)} for tag in events.Tags()["audio"]}
    assert {tag: sorted(by_step) for tag, by_step in heard.items()} == {"sample/0": [0, 2, 4], "reference/0": [0]}
    files = {(f"step-{step}", step, "sample/0") for step in (0, 2, 4)} | {("reference", 0, "reference/0")}
    for folder, step, tag in files:
        written, rate = soundfile.read(run / "samples" / folder / "0.wav")
        shown, shown_rate = soundfile.read(io.BytesIO(heard[tag][step].encoded_audio_string))
        assert (rate, len(written)) == (shown_rate, len(shown))
        assert np.abs(written - shown).max() < 1e-4  # both have 16 bits
    (words,) = json.loads((run / "samples" / "prompts.json").read_text())
    shown = events.Tensors("sample/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown == words


def test_samples_in_wandb(run: Path) -> None:
    (words,) = json.loads((run / "samples" / "prompts.json").read_text())
    sent = []
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        (log,) = folder.glob("*.wandb")
        for path in sorted((folder / "files" / "media" / "audio").rglob("*.wav")):
            step = path.stem.split("_")[1]
            name = "reference" if path.parent.name == "reference" else f"step-{step}"
            assert path.read_bytes() == (run / "samples" / name / "0.wav").read_bytes()
            assert path.name.encode() in log.read_bytes()
            sent.append(name)
        assert json.dumps(words).encode() in log.read_bytes()
    assert sorted(sent) == ["reference", "step-0", "step-2", "step-4", "step-4"]  # step 4 in both starts


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    options, _ = parse_train_options(["--report_to", "wandb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    (problem,) = support.unsupported(options, {"zero_optimization": {"stage": 2}}, on_gpu=False)
    assert problem == "--report_to wandb: the package wandb is not installed; pip install wandb"


def test_quiet(tmp_path: Path, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> None:
    command = [sys.executable, f"{PROJECT}/launch/train.py", *RANDOM]
    command += options(mixed_manifest, ds_file(2), tmp_path / "run")
    environment = rank_environment(0, 1, free_port()) | {"TORCH_DISTRIBUTED_DEBUG": "OFF"}
    done = subprocess.run(
        [*overriding(command), "--quiet"], env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert len(read_metrics(tmp_path / "run")) == 6
