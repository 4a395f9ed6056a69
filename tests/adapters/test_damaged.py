"""Adapters and checkpoints with a flipped bit, truncated or half copied: detected, and never used."""

from __future__ import annotations

import random
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from higgs_ds.adapters.load import Adapter, read_adapter
from higgs_ds.adapters.save import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFormat, write_adapter
from higgs_ds.checkpoints.folder import MANIFEST_FILE, manifest_of, newest_complete, why_incomplete
from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import write_json
from higgs_ds.common.run_files import ADAPTER_FOLDER
from higgs_ds.model.quantization import BaseQuantization

LAYERS = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
FLIPS = 400


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in LAYERS:
        tensors[f"{layer}.lora_A.weight"] = torch.randn(2, 8, generator=draw)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(8, 2, generator=draw)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["self_attn.q_proj"], base_model_name_or_path="base")
    quantization = BaseQuantization("bfloat16", "0.50", "cpu", {"model.layers.0.self_attn.q_proj.weight": "0123"})
    folder = tmp_path / ADAPTER_FOLDER
    write_adapter(folder, tensors, AdapterFormat(config, quantization), must_have_moved=True)
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def effect(adapter: Adapter) -> tuple[Any, ...]:
    factors = {name: [part for part in astuple(f) if part is not None] for name, f in adapter.factors.items()}
    return (
        sorted(factors),
        [t.tolist() for name in sorted(factors) for t in factors[name]],
        adapter.scaling,
        adapter.quantization,
    )


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_a_flipped_bit_in_an_adapter(adapter: Path, tmp_path: Path, name: str) -> None:
    """The error names the folder, or the bit has no effect, as in the name of the base."""
    intact, draw, named, harmless = effect(read_adapter(adapter)), random.Random(2), 0, 0
    for bit in draw.sample(range(8 * (adapter / name).stat().st_size), FLIPS):
        broken = tmp_path / "broken"
        shutil.copytree(adapter, broken, dirs_exist_ok=True)
        flip(broken / name, bit)
        try:
            assert effect(read_adapter(broken)) == intact, f"bit {bit} of {name}"
        except InputError as error:
            named += str(broken) in str(error)
        else:
            harmless += 1
    assert named + harmless == FLIPS
    assert named > FLIPS / 4


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, ADAPTER_CONFIG])
def test_an_adapter_truncated_or_half_copied(adapter: Path, name: str) -> None:
    content = (adapter / name).read_bytes()
    for length in [*range(0, len(content), 97), len(content) - 2]:
        (adapter / name).write_bytes(content[:length])
        with pytest.raises(InputError, match=str(adapter)):
            read_adapter(adapter)
    (adapter / name).unlink()
    with pytest.raises(InputError, match=str(adapter)):
        read_adapter(adapter)


def test_a_file_of_another_adapter(adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["self_attn.q_proj"])
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    write_adapter(other, tensors, AdapterFormat(config), must_have_moved=True)
    shutil.copyfile(other / ADAPTER_CONFIG, adapter / ADAPTER_CONFIG)
    with pytest.raises(InputError, match="has changed since it was written"):
        read_adapter(adapter)


@pytest.fixture
def checkpoints(adapter: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run's older and newer checkpoint."""
    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(adapter, folder / ADAPTER_FOLDER)
        save_file({"exp_avg.a": torch.full((5,), float(step))}, folder / "optimizer.safetensors")
        save_file({"0.cpu": torch.arange(5)}, folder / "rng_state.safetensors")
        write_json(folder / "trainer_state.json", TrainerState(10, {}, step=step).to_json())
        write_json(folder / MANIFEST_FILE, manifest_of(folder))
    return tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4"


def test_a_flipped_bit_in_a_checkpoint(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    older, newer = checkpoints
    shutil.copytree(newer, tmp_path / "intact")
    files = [path.relative_to(newer) for path in newer.rglob("*") if path.is_file() and path.name != MANIFEST_FILE]
    draw = random.Random(3)
    for _ in range(FLIPS):
        name = draw.choice(files)
        flip(newer / name, draw.randrange(8 * (newer / name).stat().st_size))
        found, skipped = newest_complete(newer.parent)
        assert found == older
        assert skipped == [f"{newer}: skipped: {name} has changed since it was written"]
        shutil.copyfile(tmp_path / "intact" / name, newer / name)
    assert newest_complete(newer.parent) == (newer, [])


def test_a_flipped_bit_in_a_manifest(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    """All other files are unchanged: the checkpoint is either used, or skipped with a note that names it."""
    older, newer = checkpoints
    manifest, skipped = (newer / MANIFEST_FILE).read_bytes(), 0
    draw = random.Random(4)
    for _ in range(FLIPS):
        flip(newer / MANIFEST_FILE, draw.randrange(8 * len(manifest)))
        found, notes = newest_complete(newer.parent)
        assert found in (older, newer)
        assert (found == older) == any(str(newer) in note for note in notes)
        skipped += found == older
        (newer / MANIFEST_FILE).write_bytes(manifest)
    assert skipped > FLIPS / 4


def test_a_checkpoint_truncated_or_half_copied(checkpoints: tuple[Path, Path]) -> None:
    older, newer = checkpoints
    for path in [path for path in newer.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert newest_complete(newer.parent)[0] == older, path
        path.unlink()
        assert newest_complete(newer.parent)[0] == older, path
        path.write_bytes(content)
    (newer / ADAPTER_FOLDER).rename(newer / "elsewhere")
    assert why_incomplete(newer) == f"missing {ADAPTER_FOLDER}/README.md"
