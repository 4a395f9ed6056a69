"""Learning rates: of each group of trained weights, and over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from higgs_ds.adapters.load import PEFT_PREFIX
from higgs_ds.model.full import group_of
from higgs_ds.model.parts import ATTENTION_MODULES, NO_PARTS, Parts
from higgs_ds.options.learning_rates import AUDIO_SELF_ATTENTION, WHISPER, group_rates
from higgs_ds.options.optim import OptimOptions

LORA_B = "lora_B"


def group_of_trained(name: str, full_parts: Parts = NO_PARTS) -> str:
    """Return the group of --group_lr that a trained tensor belongs to, by its name in `trained_parameters`."""
    if full_parts.has(name):
        return WHISPER if set(ATTENTION_MODULES).isdisjoint(name.split(".")) else AUDIO_SELF_ATTENTION
    group = group_of(name.removeprefix(PEFT_PREFIX))
    assert group is not None, name  # only a part of its own has no group
    return group


def parameter_groups(
    options: OptimOptions, trained: Mapping[str, nn.Parameter], full_parts: Parts = NO_PARTS
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, each with its peak learning rate and its name in the log.

    The first group, "", has --lr. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) multiplies the learning rate of B factors
    and, as PEFT's does, of the vectors that belong to adapters: B's bias, and DoRA's row norms.
    """
    rates, groups = group_rates(options.group_lr), dict[str, dict[str, Any]]()
    for tensor_name, parameter in trained.items():
        group = group_of_trained(tensor_name, full_parts) if rates else ""
        names, lr = ([group], rates[group]) if group in rates else ([], options.lr)
        if options.loraplus_lr_ratio is not None and _is_scaled_by_loraplus(tensor_name):
            names, lr = [*names, LORA_B], lr * options.loraplus_lr_ratio
        name = "/".join(names)
        groups.setdefault(name, {"params": [], "lr": lr, "name": name})["params"].append(parameter)
    return [groups[name] for name in sorted(groups)]


def _is_scaled_by_loraplus(name: str) -> bool:
    return f".{LORA_B}." in name or name.endswith(".lora_magnitude_vector")


def current_rates(schedule: Any, lr: float) -> dict[str, float]:
    """Return the learning rates of the next step by their names in the log: of --lr, and of groups with another."""
    share = schedule.lr_lambdas[0](schedule.last_epoch)
    named = zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True)
    return {"lr": lr * share} | {f"lr/{group['name']}": float(rate) for group, rate in named if group["name"]}


def make_schedule(
    options: OptimOptions, optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int | None = None
) -> Any:
    """Return transformers' learning rate schedule over `total_steps` optimizer steps."""
    if warmup_steps is None:
        warmup_steps = int(options.warmup_ratio * total_steps)
    specific = {
        "cosine_with_restarts": {"num_cycles": options.lr_cycles},
        "warmup_stable_decay": {"num_decay_steps": math.ceil(options.lr_decay_ratio * total_steps)},
    }
    return get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific.get(options.lr_scheduler_type),
    )
