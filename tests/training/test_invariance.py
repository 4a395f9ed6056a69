"""The same samples per step give the same losses and adapters for any split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_metrics
from launcher import train_runs
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

LAYOUTS = {"1x1x4": (1, 1, 4), "2x1x2": (2, 1, 2), "2x2x1": (2, 2, 1)}  # ranks, batch size, accumulation
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """Output folders STAGE-LAYOUT. Nine samples in windows of 4, 4 and 1, twice; some batches have no audio."""
    root = tmp_path_factory.mktemp("invariance")
    for world_size in (1, 2):
        runs = []
        for name, (ranks, batch_size, grad_accum) in LAYOUTS.items():
            for stage in STAGES:
                if ranks == world_size:
                    runs.append(
                        f"--deepspeed {ds_file(stage)} --output_dir {root}/{stage}-{name} --precision fp32 "
                        f"--train_manifest {mixed_manifest} --val_manifest {mixed_manifest} --allow_text_targets "
                        f"--batch_size {batch_size} --grad_accum {grad_accum} --epochs 2 --lora_dropout 0 "
                        "--log_steps 1 --val_steps 3".split()
                    )
        train_runs(world_size, runs)
    return root


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_adapters(results: Path, stage: int, layout: str) -> None:
    reference, other = results / "0-1x1x4", results / f"{stage}-{layout}"
    expected, found = read_metrics(reference), read_metrics(other)
    assert [line["step"] for line in expected] == [1, 2, 3, 3, 4, 5, 6, 6]
    for expected_line, found_line in zip(expected, found, strict=True):
        losses = [key for key in expected_line if "loss" in key]
        assert len(losses) == 11
        for key in losses:
            assert found_line[key] == pytest.approx(expected_line[key], abs=1e-5), (expected_line["step"], key)
        if "grad_norm" in expected_line:  # Adam hides a wrong scale from the losses, the norm does not
            assert found_line["grad_norm"] == pytest.approx(expected_line["grad_norm"], rel=1e-4)
    expected_tensors = load_file(reference / "lora_adapters" / "adapter_model.safetensors")
    found_tensors = load_file(other / "lora_adapters" / "adapter_model.safetensors")
    assert expected_tensors.keys() == found_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert (found_tensors[name] - tensor).abs().max() <= 1e-5, name
