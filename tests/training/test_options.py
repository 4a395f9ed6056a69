"""Options that must not change what is trained, and bf16 against float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_metrics
from launcher import train_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """Runs of eight steps on two ranks, by name."""
    root = tmp_path_factory.mktemp("options")

    def options(name: str, stage: int, more: str) -> list[str]:
        return (
            f"--deepspeed {ds_file(stage)} --output_dir {root}/{name} --train_manifest {mixed_manifest} --val_split 0 "
            "--allow_text_targets --batch_size 1 --grad_accum 2 --max_steps 8 --lr 2e-3 --lora_dropout 0 --log_steps 1 "
            f"{more}"
        ).split()

    runs = [options(f"fp32-{stage}", stage, "--precision fp32") for stage in (2, 3)]
    runs += [options(f"bf16-{stage}", stage, "--precision bf16") for stage in STAGES]
    for stage, which in ((2, "2"), (3, "every_layer")):
        runs.append(options(f"recompute-{stage}", stage, f"--precision fp32 --activation_checkpointing {which}"))
    train_runs(2, runs)
    return root


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder)]


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_float32(results: Path, stage: int) -> None:
    """bf16 weights with float32 master weights: this detects a first step that is too small, or sums in bf16."""
    assert losses(results / f"bf16-{stage}") == pytest.approx(losses(results / "fp32-2"), abs=0.02)


@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing_changes_nothing(results: Path, stage: int) -> None:
    expected, found = results / f"fp32-{stage}", results / f"recompute-{stage}"
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    tensors = load_file(found / "lora_adapters" / "adapter_model.safetensors")
    for name, tensor in load_file(expected / "lora_adapters" / "adapter_model.safetensors").items():
        assert (tensors[name] - tensor).abs().max() <= 1e-5, name
