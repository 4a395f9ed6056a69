"""What short commands import: a library that takes seconds must not come back by way of an import at the top."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROJECT, VOICES_MANIFEST
from peft import LoraConfig
from safetensors.torch import save_file

# Runs a command as its launcher does, then prints which modules it has imported.
REPORT = """
import json, runpy, sys
import higgs_ds.common.process as process
process.exit_process = lambda code: print(json.dumps([code, sorted({m.partition(".")[0] for m in sys.modules})]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SLOW = {
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "torchaudio",
    "accelerate",
    "matplotlib",
}


def imported_by(command: str, *options: object) -> set[str]:
    """Return the slow libraries that a command imports."""
    arguments = [str(PROJECT / "launch" / f"{command}.py"), *map(str, options)]
    done = subprocess.run([sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return SLOW & set(modules)


def test_check_of_data(base: Path, cache_dir: Path) -> None:
    options = ("--check_only", "--base_ckpt", base, "--train_manifest", VOICES_MANIFEST, "--flag_codec_clips", 0)
    assert imported_by("prepare", *options) == set()


def test_check_with_a_new_cache_shows_no_bars_over_tensors(tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "launch" / "prepare.py"), "--check_only"]
    environment = os.environ | {"HIGGS_DS_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "5 compared" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["find_lora_adapters", "validate_adapter", "convert", "blend"])
def test_commands_for_adapters(command: str, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    LoraConfig(r=2, target_modules=["self_attn.q_proj"], base_model_name_or_path="x").save_pretrained(tmp_path / "old")
    factors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(factors, tmp_path / "old" / "adapter_model.safetensors")
    options: tuple[object, ...] = (tmp_path / "old",)
    if command == "convert":
        options = ("--input_path", *options, "--output_path", tmp_path / "new", "--to", "original")
    if command == "blend":
        options = (f"{tmp_path / 'old'}=0.5", "--output_path", tmp_path / "new", "--rank", "1")
    assert imported_by(command, *options) == {"torch"}
