"""Compare the same training run on a GPU and on the CPU. Skipped without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, read_metrics
from launcher import train_runs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("more", ["", "--load_in_4bit", "--load_in_4bit --offload_embeddings"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_losses_as_on_the_cpu(
    tmp_path: Path, mixed_manifest: Path, monkeypatch: pytest.MonkeyPatch, stage: int, more: str
) -> None:
    def options(name: str) -> list[str]:
        return (
            f"--deepspeed {PROJECT}/ds_configs/zero{stage}.json --output_dir {tmp_path}/{name} --precision fp32 "
            f"--train_manifest {mixed_manifest} --val_split 0 --allow_text_targets --grad_accum 2 --max_steps 4 "
            f"--lora_dropout 0 --log_steps 1 {more}"
        ).split()

    train_runs(1, [options("gpu")])
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    train_runs(1, [options("cpu")])
    for on_gpu, on_cpu in zip(read_metrics(tmp_path / "gpu"), read_metrics(tmp_path / "cpu"), strict=True):
        assert on_gpu["train/loss"] == pytest.approx(on_cpu["train/loss"], abs=1e-3)


@pytest.mark.parametrize("path", sorted((PROJECT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_in_bf16(tmp_path: Path, path: Path) -> None:
    train_runs(1, [f"--deepspeed {path} --output_dir {tmp_path}/run --max_steps 2 --grad_accum 2".split()])
    assert (tmp_path / "run" / "lora_adapters" / "adapter_model.safetensors").is_file()
