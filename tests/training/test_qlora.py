"""A 4-bit base: the same losses on any ranks, exact resume, adapters that load on both bases, a faithful merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from launcher import train_runs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, HiggsAudioV2ForConditionalGeneration

from higgs_ds.adapters.merge import merge

pytestmark = pytest.mark.slow

LAYOUTS = {"1 rank": (1, 2, 2), "ZeRO-2 x 2": (2, 2, 1), "ZeRO-3 x 2": (2, 3, 1)}  # ranks, stage, accumulation
OTHERS = {"bf16": "--precision bf16", "DoRA": "--use_dora --use_rslora", "8-bit AdamW": "--optim adamw_8bit"}
STEPS = 6


def options(manifest: Path, ds_json: Path, folder: Path, grad_accum: int, more: str = "") -> list[str]:
    return (
        f"--deepspeed {ds_json} --output_dir {folder} --train_manifest {manifest} --allow_text_targets --load_in_4bit "
        f"--val_manifest {manifest} --batch_size 1 --grad_accum {grad_accum} --max_steps {STEPS} --lr 5e-3 "
        f"--lora_dropout 0 --log_steps 1 --val_steps 3 --save_steps 3 --precision fp32 {more}"
    ).split()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, mixed_manifest: Path, ds_file: Callable[[int], Path]) -> Path:
    """Finished runs by layout, NAME; NAME-again, resumed from a copy's middle checkpoint; OTHERS on one rank."""
    root = tmp_path_factory.mktemp("qlora")
    for world_size in (1, 2):
        layouts = {name: layout for name, layout in LAYOUTS.items() if layout[0] == world_size}
        runs = [
            options(mixed_manifest, ds_file(stage), folder_of(root, name), accum)
            for name, (_, stage, accum) in layouts.items()
        ]
        if world_size == 1:
            runs += [
                options(mixed_manifest, ds_file(2), folder_of(root, name), 2, more) for name, more in OTHERS.items()
            ]
        train_runs(world_size, runs)
        if world_size == 1:
            layouts["8-bit AdamW"] = (1, 2, 2)
        again = []
        for name, (_, stage, accum) in layouts.items():
            folder = folder_of(root, f"{name}-again")
            shutil.copytree(folder_of(root, name), folder)
            shutil.rmtree(folder / f"checkpoint-{STEPS}")
            more = f"--resume auto {OTHERS.get(name, '')}"
            again.append(options(mixed_manifest, ds_file(stage), folder, accum, more))
        train_runs(world_size, again)
    return root


def folder_of(root: Path, name: str) -> Path:
    return root / name.replace(" ", "-")


def losses(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if "loss" in key} for line in read_metrics(folder)]


@pytest.mark.parametrize("name", [*LAYOUTS, "bf16", "8-bit AdamW"])
def test_same_losses(results: Path, name: str) -> None:
    expected, found = losses(folder_of(results, "1 rank")), losses(folder_of(results, name))
    assert len(expected) == len(found) == STEPS + 2
    tolerance = 1e-3 if name in LAYOUTS else 0.03
    for expected_line, found_line in zip(expected, found, strict=True):
        assert found_line == pytest.approx(expected_line, abs=tolerance)
    assert expected[-1]["val/loss"] < expected[2]["train/loss"] - 0.5  # it learns


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_exact(results: Path, name: str) -> None:
    whole, again = folder_of(results, name), folder_of(results, f"{name}-again")
    assert losses(again) == losses(whole)
    for file in ("lora_adapters/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.safetensors"):
        expected, found = load_file(whole / file), load_file(again / file)
        assert expected.keys() == found.keys()
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_8_bit_state_resumes_closely(results: Path) -> None:
    """A checkpoint stores it in float32; resuming rounds it to 8 bits once more."""
    whole, again = folder_of(results, "8-bit AdamW"), folder_of(results, "8-bit AdamW-again")
    for expected, found in zip(losses(whole), losses(again), strict=True):
        assert found == pytest.approx(expected, abs=5e-3)
    moments = load_file(again / f"checkpoint-{STEPS}" / "optimizer.safetensors")
    for key, expected in load_file(whole / f"checkpoint-{STEPS}" / "optimizer.safetensors").items():
        assert (moments[key] - expected).abs().max() <= 0.05 * expected.abs().max()
        assert len(expected.unique()) > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_checkpoints_hold_what_trains_and_nothing_else(results: Path, name: str) -> None:
    folder = folder_of(results, name) / f"checkpoint-{STEPS}"
    adapter = load_file(folder / "lora_adapters" / "adapter_model.safetensors")
    assert len(adapter) == 40
    assert all(tensor.isfinite().all() and tensor.any() for tensor in adapter.values())
    assert all(".lora_A." in key or ".lora_B." in key for key in adapter)
    moments = load_file(folder / "optimizer.safetensors")
    assert moments.keys() == {f"{moment}.{key}" for key in adapter for moment in ("exp_avg", "exp_avg_sq")}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 3 * sum(tensor.nbytes for tensor in adapter.values()) + 100_000


def in_4bit(base: Path) -> HiggsAudioV2ForConditionalGeneration:
    """The base as transformers quantizes it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["audio_lm_head", "text_lm_head"],
    )
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        base, use_text_head=True, dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would compute in bf16
    return model.eval()


def plain(folder: Path) -> HiggsAudioV2ForConditionalGeneration:
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return text and audio logits of some tokens and frames."""
    higgs = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(256, (1, 20), generator=generator)
    frames = torch.full((1, 30), higgs.config.audio_token_id)
    codes = torch.randint(1024, (1, 30, 8), generator=generator)
    hidden = higgs.model(input_ids=torch.cat([words, frames], 1), audio_input_ids=codes).last_hidden_state
    return torch.cat([higgs.text_lm_head(hidden), higgs.audio_lm_head(hidden)], dim=-1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_load_on_both_bases(results: Path, base: Path, name: str) -> None:
    adapter = folder_of(results, name) / "lora_adapters"
    on_4bit, on_16bit = (PeftModel.from_pretrained(load(base), adapter) for load in (in_4bit, plain))
    first = PeftModel.from_pretrained(in_4bit(base), folder_of(results, "1 rank") / "lora_adapters")
    assert (logits(on_4bit) - logits(first)).abs().max() < 1e-3
    assert (logits(on_4bit) - logits(in_4bit(base))).abs().max() > 1  # the adapter does something
    assert (logits(on_16bit) - logits(plain(base))).abs().max() > 1


@pytest.mark.parametrize("name", ["1 rank", "ZeRO-3 x 2", "bf16", "DoRA"])
def test_merge_is_what_was_trained(results: Path, base: Path, tmp_path: Path, name: str) -> None:
    """Compare with PEFT on transformers' 4-bit base; merging into the original weights differs far more."""
    adapter = folder_of(results, name) / "lora_adapters"
    trained = logits(PeftModel.from_pretrained(in_4bit(base), adapter))
    difference = {}
    for merge_base in (None, "original"):
        folder = tmp_path / str(merge_base)
        report = merge(base, adapter, folder, merge_base)
        assert report.differing == []
        assert report.quantized == (20 if merge_base is None else 0)
        difference[merge_base] = float((logits(plain(folder)) - trained).abs().max())
        assert "quantization" not in (folder / "config.json").read_text()
    print(f"{name}: max logit difference {difference[None]:.4f} dequantized, {difference['original']:.4f} original")
    assert difference[None] <= 0.05 * difference["original"]
