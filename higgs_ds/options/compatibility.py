"""Combinations of options that do not work together. They are refused, with the reason, before anything is loaded."""

from __future__ import annotations

import importlib.util
from typing import Any

from higgs_ds.common.precision import FP16, FP32
from higgs_ds.options.train import TrainOptions

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def unsupported(options: TrainOptions, ds_settings: dict[str, Any], on_gpu: bool) -> list[str]:
    """Return why these options and DeepSpeed settings cannot be combined; empty if they can.

    The table in docs/small_cards.md says the same. The tests run every pair that is not refused here.
    """
    zero = ds_settings["zero_optimization"]
    offloads = zero.get("offload_optimizer", {}).get("device") == "cpu"
    lora, optim = options.lora, options.optim.optim
    attention, package = options.model.attn_implementation, ATTENTION_PACKAGES.get(options.model.attn_implementation)
    problems = []
    if package and importlib.util.find_spec(package) is None:
        problems.append(f"--attn_implementation {attention}: the package {package} is not installed; use sdpa")
    if package and not on_gpu:
        problems.append(f"--attn_implementation {attention}: needs a GPU, and this machine has none; use sdpa")
    if package and options.model.precision == FP32:
        problems.append(
            f"--attn_implementation {attention}: does not support float32; use sdpa, or --precision bf16 or fp16"
        )
    if options.model.precision == FP16 and not on_gpu:
        problems.append(
            "--precision fp16: needs a GPU, and this machine has none: DeepSpeed does not train in fp16 on CPUs; use "
            "--precision fp32, bf16 or auto"
        )
    problems += [
        f"--report_to {name}: the package {name} is not installed; pip install {name}"
        for name in options.run.report_to
        if importlib.util.find_spec(name) is None
    ]
    if lora.use_dora and zero["stage"] == 3:
        problems.append(
            "--use_dora: not supported at ZeRO stage 3: it needs complete weights outside of their layers' forward "
            "pass, where stage 3 has sharded them; use ds_configs/zero2.json, with --load_in_4bit if memory is short"
        )
    if lora.use_dora and lora.lora_bias:
        problems.append(
            "--use_dora and --lora_bias: PEFT treats the bias as a part of the weight; use only one of them"
        )
    if optim.startswith("paged") and not on_gpu:
        problems.append(f"--optim {optim}: pages GPU memory, and this machine has no GPU; use adamw or adamw_8bit")
    if optim != "adamw" and offloads:
        problems.append(
            f"--optim {optim}: saves GPU memory, but offload_optimizer keeps the state in host memory already; "
            "remove one of them"
        )
    return problems
