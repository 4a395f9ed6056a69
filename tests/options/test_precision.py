"""--precision auto: what a device computes in natively; DeepSpeed files follow it; fp16 without a GPU is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, read_metrics
from launcher import RANDOM, train_runs

from higgs_ds.common.errors import InputError
from higgs_ds.common.folder_lock import FolderLock
from higgs_ds.common.precision import PRECISIONS, native_precision
from higgs_ds.options.command_line import parse_train_options
from higgs_ds.options.ds_config import read_ds_config, resolve
from higgs_ds.options.train import TrainOptions
from higgs_ds.planning import dry_run
from higgs_ds.training import startup
from higgs_ds.training.loop import main

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BF16_CPUS = [{"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False}, {"bf16": True, "neon": True}]  # last: ARM
OTHER_CPU = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
# The examples of transformers' documentation of DeepSpeed, without the scheduler: ZeRO-2 and ZeRO-3 with offload.
SCHEDULER = {
    "type": "WarmupLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
}
PASTED: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu"),
        "auto",
    ),
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}  # fmt: skip
OFFLOAD = {"device": "cpu", "pin_memory": True}
PASTED_ZERO = {
    2: {
        "stage": 2, "offload_optimizer": OFFLOAD, "allgather_partitions": True, "allgather_bucket_size": 2e8,
        "overlap_comm": True, "reduce_scatter": True, "reduce_bucket_size": 2e8, "contiguous_gradients": True,
    },
    3: {
        "stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD, "overlap_comm": True,
        "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


def pasted(folder: Path, stage: int, more: dict[str, Any] | None = None) -> Path:
    path = folder / f"pasted{stage}.json"
    path.write_text(json.dumps(PASTED | {"zero_optimization": PASTED_ZERO[stage]} | (more or {}), indent=4))
    return path


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16")],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_precision(GPU) == expected


@pytest.mark.parametrize(("found", "expected"), [*((cpu, "bf16") for cpu in BF16_CPUS), (OTHER_CPU, "fp32")])
def test_cpus(monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert native_precision(CPU) == expected


@pytest.mark.parametrize(
    ("file", "given", "native", "expected"),
    [
        ({}, None, "fp16", "fp16"),
        ({}, "auto", "fp32", "fp32"),
        ({}, "bf16", "fp16", "bf16"),
        ({"bf16": "auto", "fp16": "auto"}, None, "fp16", "fp16"),
        ({"bf16": "auto", "fp16": "auto"}, None, "bf16", "bf16"),
        ({"bf16": "auto", "fp16": "auto"}, "fp16", "bf16", "fp16"),
        ({"fp16": True}, None, "bf16", "fp16"),
        ({"fp16": True}, "auto", "bf16", "fp16"),
        ({"bf16": True, "fp16": False}, None, "fp16", "bf16"),
        ({"bf16": False}, None, "bf16", "fp32"),
        ({"bf16": False}, None, "fp16", "fp16"),
        ({"fp16": False}, None, "fp16", "fp32"),
        ({"fp16": False}, None, "bf16", "bf16"),
        ({"fp16": True}, "bf16", "bf16", "fp16.enabled is true, but --precision is 'bf16': remove one of them"),
        ({"bf16": True}, "fp32", "bf16", "bf16.enabled is true, but --precision is 'fp32': remove one of them"),
        ({"bf16": False}, "bf16", "bf16", "bf16.enabled is false, but --precision is 'bf16': remove one of them"),
        ({"fp16": False}, "fp16", "bf16", "fp16.enabled is false, but --precision is 'fp16': remove one of them"),
        ({"bf16": True, "fp16": True}, None, "bf16", "enable one of them"),
    ],
)
def test_deepspeed_files(tmp_path: Path, file: dict[str, Any], given: str | None, native: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({name: {"enabled": value} for name, value in file.items()}, indent=1))
    options = TrainOptions().replace(precision=given or "auto")
    names = {"precision"} if given else set()
    if expected not in PRECISIONS:
        with pytest.raises(InputError, match=f"^{path}:.*{expected}$"):
            resolve(read_ds_config(path), options, names, 1, native)
        return
    settings, options = resolve(read_ds_config(path), options, names, 1, native)
    assert options.model.precision == expected
    assert settings["bf16"]["enabled"] == (expected == "bf16")
    assert settings.get("fp16") == ({"enabled": True} if expected == "fp16" else None)


@pytest.mark.parametrize("native", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", [2, 3])
def test_pasted_files(tmp_path: Path, stage: int, native: str) -> None:
    settings, options = resolve(read_ds_config(pasted(tmp_path, stage)), TrainOptions(), set(), 1, native)
    assert options.model.precision == native
    assert "auto" not in json.dumps(settings)
    expected = PASTED["fp16"] | {"enabled": True} if native == "fp16" else None
    assert settings.get("fp16") == expected
    path = pasted(tmp_path, stage, {"scheduler": SCHEDULER})
    with pytest.raises(InputError) as caught:
        read_ds_config(path)
    line = path.read_text().split("\n").index('    "scheduler": {') + 1
    assert caught.value.problems == [
        f"{path}:{line}: scheduler: the learning rate schedule comes from --lr_scheduler_type and --warmup_ratio; "
        "remove this section"
    ]


@pytest.mark.slow
def test_pasted_files_train_in_fp16(tmp_path: Path, small_base: Path, mixed_manifest: Path) -> None:
    runs = [
        f"--base_ckpt {small_base} --train_manifest {mixed_manifest} --allow_text_targets --batch_size 1 "
        f"--deepspeed {pasted(tmp_path, stage)} --precision fp16 --max_steps 2 --log_steps 1 --val_split 0 "
        f"--grad_accum 1 --lora_targets attention --output_dir {tmp_path}/{stage}"
        for stage in PASTED_ZERO
    ]
    train_runs(2, [run.split() for run in runs])
    first, second = ([line["train/loss"] for line in read_metrics(tmp_path / str(stage))] for stage in PASTED_ZERO)
    assert first == pytest.approx(second, abs=1e-3)
    assert len(first) == 2


def test_fp16_needs_a_gpu(tmp_path: Path, lone_rank: None) -> None:
    argv = [*RANDOM, *f"--precision fp16 --lr 0.1 --output_dir {tmp_path}/run".split()]
    with FolderLock() as lock, pytest.raises(InputError) as caught:
        startup.start(*parse_train_options(argv), lock)
    assert caught.value.problems == [
        "--precision fp16: needs a GPU, and this machine has none: DeepSpeed does not train in fp16 on CPUs; use "
        "--precision fp32, bf16 or auto"
    ]


def test_ranks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.distributed, "gather_objects", lambda value: ["bf16", "fp16"])
    problems: list[str] = []
    startup._native_precision(TrainOptions(), None, problems)
    differ = "the devices of the ranks differ (rank 0: bf16, rank 1: fp16)"
    assert problems == [f"--precision auto: {differ}; give the precision of all ranks"]
    startup._native_precision(TrainOptions().replace(precision="fp16"), None, problems)
    assert len(problems) == 1


@pytest.mark.slow
def test_auto_is_kept_by_resume(
    tmp_path: Path,
    lone_rank: None,
    small_base: Path,
    mixed_manifest: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run started on a CPU without bf16 continues in float32 on one with it."""
    argv = (
        f"--base_ckpt {small_base} --train_manifest {mixed_manifest} --allow_text_targets --batch_size 1 "
        f"--grad_accum 1 --no_report --lora_targets attention --output_dir {tmp_path}/run --save_steps 1"
    ).split()
    for steps, found in ((1, OTHER_CPU), (2, BF16_CPUS[0])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        more = ["--max_steps", str(steps), *(["--resume", "auto"] if steps == 2 else [])]
        main(*parse_train_options([*argv, *more]))
        assert "--precision auto: fp32" in capsys.readouterr().out
        assert json.loads((tmp_path / "run" / "settings.json").read_text())["precision"] == "fp32"
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["settings"]["precision"] == "fp32"


@pytest.mark.parametrize(("more", "expected"), [("--precision fp16", "fp16"), ("", "bf16")])
def test_plan_of_a_small_card(capsys: pytest.CaptureFixture[str], more: str, expected: str) -> None:
    """QLoRA of the 3B base at 1 x 2,048 positions fits a T4 with room to spare: less than 6 GiB."""
    argv = (
        f"--dry_run --base_ckpt {PROJECT}/benchmarks/3b --finetune qlora --deepspeed small_card.json "
        "--offload_embeddings --activation_checkpointing every_layer --batch_size 1 --max_seq_len 2048 "
        f"--device_memory_gib 6 {more}"
    )
    dry_run.main(*parse_train_options(argv.split()))
    printed = capsys.readouterr().out
    assert f"NF4 in {expected}" in printed
    assert "\nfits: " in printed
    assert ("--precision auto: bf16, as on most GPUs" in printed) == (not more)
