"""Full fine-tuning: which of a model's own weights are trained. Also the switch between full fine-tuning and LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from peft import PeftModel
from torch import nn

from higgs_ds.model.families import family_of_weight
from higgs_ds.model.fully_trained import NOTHING_FULLY_TRAINED, FullyTrained
from higgs_ds.model.lora import AdaptedLayer, add_lora, unfreeze
from higgs_ds.model.lora import describe as describe_lora
from higgs_ds.model.parts import NO_PARTS, TOWER_MODULES, Parts
from higgs_ds.options.fields import FULL
from higgs_ds.options.train import LoraOptions, TuneOptions


def group_of(name: str) -> str | None:
    """Return the --train_groups group of a parameter; None for the Whisper tower, which has its own option.

    Raises:
        KeyError: no model of this family has such a parameter.
    """
    path = name.split(".")
    if not set(TOWER_MODULES).isdisjoint(path):
        return None
    family = family_of_weight(name)
    if name.startswith(f"{family.layers}."):
        of_module = family.groups.get(path[3])
        return of_module[0] if of_module else family.norms[path[3]]
    own = f"{name.rpartition('.')[0]}."
    for module, group in family.outside_layers.items():
        if f"{module}.".startswith(own):
            return group
    raise KeyError(name)


def unfreeze_groups(model: nn.Module, groups: Sequence[str], full_parts: Parts = NO_PARTS) -> nn.Module:
    """Unfreeze those weights of a frozen model that are in `groups` or in optional parts `full_parts`.

    Raises:
        InputError: two names share one weight, and only one of them is in `groups`.
    """
    unfreeze(model, lambda name: group_of(name) in groups or full_parts.has(name), "--train_groups")
    return model


def make_trainable(
    model: nn.Module,
    tune: TuneOptions,
    lora: LoraOptions,
    base_name: str,
    dtype: torch.dtype,
    full_parts: Parts = NO_PARTS,
    adapted: Collection[AdaptedLayer] = (),
) -> nn.Module:
    """Prepare a frozen model for --finetune: unfreeze its own weights, or wrap it with adapters (see `add_lora`).

    Raises:
        InputError: the model does not have the weights or layers that are to be trained.
    """
    if tune.finetune == FULL:
        return unfreeze_groups(model, tune.train_groups, full_parts)
    return add_lora(model, lora, base_name, dtype, full_parts, adapted)


def describe(
    model: nn.Module, tune: TuneOptions, base_parameters: int, full: FullyTrained = NOTHING_FULLY_TRAINED
) -> str:
    """Describe what is trained, in one line.

    Args:
        base_parameters: number of parameters of the base, without those of `full.parts`.
        full: optional parts that are trained, and what is fully trained beside adapters.
    """
    if isinstance(model, PeftModel):
        return describe_lora(model, base_parameters, full)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[group_of(name) or str(Parts(audio_tower=full.parts.audio_tower))] += parameter.numel()
    trained = counts.total()
    total = base_parameters + sum(p.numel() for name, p in model.named_parameters() if full.parts.has(name))
    by_group = ", ".join(f"{group} {count:,}" for group, count in counts.items())
    parts = f"; optional parts: {full.parts}" if full.parts else ""
    return f"full fine-tuning: {trained:,} of {total:,} parameters ({trained / total:.2%}): {by_group}{parts}"
