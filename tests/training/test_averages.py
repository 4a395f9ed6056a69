"""Averaged weights (--ema_decay): computed again from checkpoints, over ranks and stages, resumed, and validated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, read_metrics
from launcher import train_runs
from peft import PeftModel
from plain_training import load, plain_loss, windows_of
from safetensors.torch import load_file

from higgs_ds.checkpoints.complete import main as export
from higgs_ds.checkpoints.inspection import find_adapters, validate_adapter, validate_checkpoint
from higgs_ds.common.errors import InputError
from higgs_ds.options.commands import ExportOptions, InspectOptions

pytestmark = pytest.mark.slow

DECAY, STEPS = 0.35, 4  # with a larger decay, the ramp of the first steps would hide it
RAMP = [2 / 11, 3 / 12, 4 / 13, DECAY]  # (1 + step) / (10 + step), up to the decay
ADAPTER, AVERAGED = "lora_adapters/adapter_model.safetensors", "lora_adapters_ema/adapter_model.safetensors"
# Ranks, DeepSpeed file, options. In float32 they are compared with "alone".
RUNS = {
    "alone": (1, "zero0", "--merge_adapter_with_base --group_lr audio_mlp=2e-3 text_mlp=2e-3"),
    "stage-0": (2, "zero0", ""),
    "stage-2-offloaded": (2, "zero2_offload", ""),
    "stage-3": (2, "zero3", ""),
    "stage-3-offloaded": (2, "zero3_offload", ""),
    "bf16-stage-0": (2, "zero0", "--precision bf16"),
    "bf16-stage-1": (2, "zero1", "--precision bf16"),
    "bf16-stage-2": (2, "zero2", "--precision bf16"),
    "bf16-stage-3": (2, "zero3_persistent", "--precision bf16"),
    "8bit": (2, "zero3", "--optim adamw_8bit --also_train heads --group_lr heads=1e-4"),
    "full": (2, "zero3", "--finetune full --train_groups audio_mlp heads"),
}
IN_FLOAT32 = [name for name in RUNS if name.startswith("stage")]
IN_BF16 = [name for name in RUNS if name.startswith("bf16")]
TRAINED_WITHOUT = ["stage-3", *IN_BF16]
RESUMED = ["stage-3", "bf16-stage-1", "full"]
Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(ds_files: Path, small_base: Path, mixed_manifest: Path) -> Options:
    """At stage 3, all parameters are partitioned or, with "zero3_persistent", the small ones are kept whole."""

    def make(root: Path, name: str, ending: str = "", average: str = f"--ema_decay {DECAY}") -> list[str]:
        ranks, ds_name, more = RUNS[name]
        dropout = "" if "full" in more else "--lora_dropout 0"
        shipped = PROJECT / "ds_configs" / f"{ds_name.removesuffix('_persistent')}.json"
        ds_config = shipped if ds_name.endswith("_persistent") else ds_files / shipped.name
        return (
            f"--deepspeed {ds_config} --output_dir {root}/{name}{ending} --base_ckpt {small_base} "
            f"--train_manifest {mixed_manifest} --val_manifest {mixed_manifest} --allow_text_targets --batch_size 1 "
            f"--precision fp32 --grad_accum {4 // ranks} --max_steps {STEPS} --lr 2e-3 --warmup_ratio 0.25 "
            f"--log_steps 1 --lr_scheduler_type constant_with_warmup --val_steps 2 --save_steps 1 {dropout} "
            f"{more} {average}"
        ).split()

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Path:
    """Runs by name; NAME-plain without an average; NAME-again resumed from the middle."""
    root = tmp_path_factory.mktemp("averages")
    train_runs(1, [options(root, "alone")])
    with_average = [options(root, name) for name, (ranks, *_) in RUNS.items() if ranks == 2]
    train_runs(2, [*with_average, *(options(root, name, "-plain", "") for name in TRAINED_WITHOUT)])
    resumed = [*RESUMED, "8bit"]
    for name in resumed:
        shutil.copytree(root / name, root / f"{name}-again")
        for step in range(3, STEPS + 1):
            shutil.rmtree(root / f"{name}-again" / f"checkpoint-{step}")
    train_runs(2, [[*options(root, name, "-again"), "--resume", "auto"] for name in resumed])
    return root


def weights(run: Path, step: int = STEPS, averaged: bool = False) -> dict[str, torch.Tensor]:
    ending = "_ema" if averaged else ""
    full = run / f"checkpoint-{step}" / f"trained_weights{ending}" / "model.safetensors"
    return load_file(full if full.is_file() else run / f"checkpoint-{step}" / (AVERAGED if averaged else ADAPTER))


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


@pytest.mark.parametrize("name", RUNS)
def test_average_of_the_checkpoints(runs: Path, name: str) -> None:
    """The first step has a learning rate of 0, so that its checkpoint holds the initial weights."""
    expected = {name: tensor.double() for name, tensor in weights(runs / name, 1).items()}
    for step, decay in enumerate(RAMP, start=1):
        now = weights(runs / name, step)
        expected = {key: decay * tensor + (1 - decay) * now[key] for key, tensor in expected.items()}
        assert differences(expected, weights(runs / name, step, averaged=True)) < 2e-7, step
    assert differences(expected, {key: tensor.double() for key, tensor in now.items()}) > 5e-4


@pytest.mark.parametrize("name", TRAINED_WITHOUT)
def test_training_is_the_same_without_an_average(runs: Path, name: str) -> None:
    expected, found = (read_metrics(runs / f"{name}-plain"), read_metrics(runs / name))
    assert sum("val_ema/loss" in line for line in found) == 2
    for expected_line, line in zip(expected, found, strict=True):
        assert not any(key.startswith("val_ema") for key in expected_line)
        for key in expected_line:
            assert line[key] == expected_line[key] or "loss" not in key, key
    for one, other in ((weights(runs / folder) for folder in (f"{name}-plain", name)),
                       (load_file(runs / folder / f"checkpoint-{STEPS}" / "optimizer.safetensors")
                        for folder in (f"{name}-plain", name))):  # fmt: skip
        assert differences(one, other) == 0
    assert not list((runs / f"{name}-plain").rglob("*_ema"))


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_to_the_last_bit(runs: Path, name: str) -> None:
    whole, again = runs / name, runs / f"{name}-again"
    for averaged in (False, True):
        assert differences(weights(whole, STEPS, averaged), weights(again, STEPS, averaged)) == 0
    lines = [[{key: value for key, value in line.items() if "loss" in key} for line in read_metrics(run)]
             for run in (whole, again)]  # fmt: skip
    assert lines[0] == lines[1]


def test_resumed_with_state_in_8_bits(runs: Path) -> None:
    """At stage 3. A resumed run rounds Adam's state once more, but the average is in float32."""
    for averaged in (False, True):
        whole, again = (weights(runs / f"8bit{ending}", STEPS, averaged) for ending in ("", "-again"))
        assert differences(whole, again) < 1e-3
    assert differences(*(weights(runs / f"8bit{end}", 2, averaged=True) for end in ("", "-again"))) == 0


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_same_on_ranks_and_stages(runs: Path, name: str) -> None:
    for averaged in (False, True):
        assert differences(weights(runs / "alone", STEPS, averaged), weights(runs / name, STEPS, averaged)) < 1e-4
    expected, found = (
        [line for line in read_metrics(runs / folder) if "val_ema/loss" in line] for folder in ("alone", name)
    )
    assert [line["step"] for line in found] == [2, 4]
    for expected_line, line in zip(expected, found, strict=True):
        for key in expected_line:
            if key.startswith("val") and "loss" in key:
                assert line[key] == pytest.approx(expected_line[key], abs=5e-5), key


def losses_by_peft(base: Path, adapter: Path, windows: list[list[Any]]) -> float:
    model = PeftModel.from_pretrained(load(base), adapter).eval()
    with torch.no_grad():
        return plain_loss(model.get_base_model(), [batch for batches in windows for batch in batches]).item()


@pytest.mark.usefixtures("lone_rank")
def test_validated_as_the_saved_adapter(
    runs: Path, small_base: Path, mixed_manifest: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Plain PEFT on the nine samples, with the adapter of each checkpoint and with that of its averages."""
    windows = windows_of(small_base, mixed_manifest, cache_dir, 3)
    for line in read_metrics(runs / "alone"):
        if "val/loss" in line:
            checkpoint = runs / "alone" / f"checkpoint-{line['step']}"
            plain = losses_by_peft(small_base, checkpoint / "lora_adapters", windows)
            averaged = losses_by_peft(small_base, checkpoint / "lora_adapters_ema", windows)
            assert (line["val/loss"], line["val_ema/loss"]) == pytest.approx((plain, averaged), abs=2e-5)
            assert abs(plain - averaged) > 1e-3


@pytest.mark.parametrize("name", IN_BF16)
def test_validated_in_bf16(runs: Path, name: str) -> None:
    expected, found = (
        [line["val_ema/loss"] for line in read_metrics(runs / folder) if "val_ema/loss" in line]
        for folder in ("alone", name)
    )
    assert found == pytest.approx(expected, abs=2e-3)  # the losses of the last weights are 0.02 lower


def test_folders_and_commands(runs: Path, small_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "alone"
    assert differences(load_file(run / AVERAGED), weights(run, averaged=True)) == 0
    assert "The weights are an exponential moving average over the steps." in (
        (run / "lora_adapters_ema" / "README.md").read_text()
    )
    card = (run / "lora_adapters" / "README.md").read_text()
    assert "    --group_lr audio_mlp=2e-3 text_mlp=2e-3\n" in card
    assert f"    --ema_decay {DECAY}\n" in card
    assert "| val_ema/loss |" in card
    assert "exponential moving average" not in card
    # The plain adapter is merged.
    assert (run / "final_model" / "adapter_model.safetensors").read_bytes() == (run / ADAPTER).read_bytes()
    find_adapters(InspectOptions(run))
    assert f"{run}/lora_adapters_ema\n  rank 16" in capsys.readouterr().out
    validate_adapter(InspectOptions(run / "lora_adapters_ema", str(small_base)))
    capsys.readouterr()
    validate_checkpoint(InspectOptions(run / f"checkpoint-{STEPS}"))
    assert "averaged adapter: 20 layers adapted" in capsys.readouterr().out


def test_a_checkpoint_without_its_averages(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, folder, what in (("alone", "lora_adapters_ema", "adapter"), ("full", "trained_weights_ema", "weights")):
        shutil.copytree(runs / name / "checkpoint-4", tmp_path / name / "checkpoint-4")
        shutil.rmtree(tmp_path / name / "checkpoint-4" / folder)
        with pytest.raises(InputError, match=f"failed checks: as written, averaged {what}"):
            validate_checkpoint(InspectOptions(tmp_path / name / "checkpoint-4"))
        capsys.readouterr()


def test_exported_averages(runs: Path, tmp_path: Path) -> None:
    export(ExportOptions(runs / "full" / "checkpoint-4", tmp_path / "averaged", ema=True))
    exported = load_file(tmp_path / "averaged" / "model.safetensors")
    for name, tensor in weights(runs / "full", averaged=True).items():
        assert exported[name].equal(tensor.to(exported[name].dtype)), name
    final = load_file(runs / "full" / "final_model" / "model.safetensors")
    assert all(final[name].equal(tensor.to(final[name].dtype)) for name, tensor in weights(runs / "full").items())
    shutil.copytree(runs / "full" / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-4" / "trained_weights_ema")
    with pytest.raises(InputError, match="holds no averaged weights: its run had no --ema_decay"):
        export(ExportOptions(tmp_path / "checkpoint-4", tmp_path / "none", ema=True))
