"""Pairs of options that do not work together, refused before anything is loaded, with the reason."""

from __future__ import annotations

import importlib.util
from typing import Any

from higgs_ds.options.train import TrainOptions

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def unsupported(options: TrainOptions, ds_settings: dict[str, Any], on_gpu: bool) -> list[str]:
    """What cannot be trained with these options and DeepSpeed settings; empty where all can.

    The table in the README says the same; the tests run every pair that is not named here.
    """
    zero = ds_settings["zero_optimization"]
    offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
    lora, optim = options.lora, options.optim.optim
    attention, package = options.model.attn_implementation, ATTENTION_PACKAGES.get(options.model.attn_implementation)
    problems = []
    if package and importlib.util.find_spec(package) is None:
        problems.append(f"--attn_implementation {attention}: the package {package} is not installed; leave it at sdpa")
    if package and not on_gpu:
        problems.append(f"--attn_implementation {attention}: is for GPUs, and there is none here; leave it at sdpa")
    if package and options.model.precision != "bf16":
        problems.append(f"--attn_implementation {attention}: knows no float32; leave it at sdpa, or train in bf16")
    problems += [
        f"--report_to {name}: the package {name} is not installed; pip install {name}"
        for name in options.run.report_to
        if importlib.util.find_spec(name) is None
    ]
    if lora.use_dora and zero["stage"] == 3:
        problems.append(
            "--use_dora: not at ZeRO stage 3: it needs whole weights outside of their layers' forward, where stage 3 "
            "has parted them; take ds_configs/zero2.json, with --load_in_4bit where memory is short"
        )
    if lora.use_dora and lora.lora_bias:
        problems.append("--use_dora and --lora_bias: PEFT takes the bias for a part of the weight; give one of them")
    if optim.startswith("paged") and not on_gpu:
        problems.append(f"--optim {optim}: pages a GPU's memory, and there is no GPU here; take adamw or adamw_8bit")
    if optim != "adamw" and offloads:
        problems.append(
            f"--optim {optim}: saves GPU memory, but offload_optimizer keeps the state in host memory already; "
            "leave out one of them"
        )
    return problems
