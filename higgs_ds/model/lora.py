"""LoRA by PEFT: targets found in the model, not assumed; reported; refused where some layer lacks one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig

from higgs_ds.common.errors import InputError
from higgs_ds.model.parts import NO_PARTS, TOWER_MODULES, Parts
from higgs_ds.options.train import LoraOptions

# Which part of a decoder layer belongs to which group of targets. `audio_attn` exists in some of the family.
GROUP_OF_MODULE = {
    "self_attn": "attention",
    "audio_attn": "attention",
    "mlp": "text_mlp",
    "audio_mlp": "audio_mlp",
}
_LAYER_LINEAR = re.compile(r"^model\.layers\.(\d+)\.((\w+)\.\w+)$")


def discover_targets(model: nn.Module, groups: Sequence[str], left_out: Parts = NO_PARTS) -> list[str]:
    """Names, from the layer on (`audio_mlp.up_proj`), of the decoder's linear layers in the given groups.

    `audio_mlp.up_proj` and `mlp.up_proj` are told apart: PEFT matches a name only behind a dot.
    Raises InputError: a group has no module, or a module is missing in some layers.
    """
    found: Counter[str] = Counter()
    layers = set()
    present = set()
    for name, module in model.named_modules():
        match = _LAYER_LINEAR.match(name)
        if match is None or not isinstance(module, nn.Linear) or left_out.has(name):
            continue
        layers.add(match[1])
        group = GROUP_OF_MODULE.get(match[3])
        if group in groups:
            found[match[2]] += 1
            present.add(group)
    problems = [
        f"--lora_targets {group}: the base has no such linear layers" for group in groups if group not in present
    ]
    problems += [
        f"--lora_targets: {name} is in {count} of {len(layers)} decoder layers; it must be in all or none"
        for name, count in sorted(found.items())
        if count != len(layers)
    ]
    if problems:
        raise InputError(problems)
    return sorted(found)


def check_biases(config: PreTrainedConfig, options: LoraOptions) -> None:
    """Raise InputError where adapters are to have biases and their layers have none that these could be merged into."""
    without = [
        group
        for group in options.lora_targets
        if not (config.attention_bias if group == "attention" else config.mlp_bias)
    ]
    if options.lora_bias and without:
        raise InputError(
            f"--lora_bias: the base's layers in {', '.join(without)} have no bias, so that such an adapter could not "
            "be merged into them; leave it out"
        )


def add_lora(
    model: nn.Module, options: LoraOptions, base_name: str, dtype: torch.dtype, full_parts: Parts = NO_PARTS
) -> PeftModel:
    """Wrap a frozen model with adapters of `dtype`. The second factor starts at 0: nothing changes at first.

    Optional parts that are trained `full_parts` get no adapters; their own parameters are unfrozen.

    No task type is given: PEFT would pass `labels` into a forward of another meaning. The adapters are not upcast
    (PEFT's default): the engine keeps float32 master weights of them.
    """
    # A tower has layers of the same names as the decoder's.
    has_tower = any(in_tower in name.split(".") for name, _ in model.named_modules() for in_tower in TOWER_MODULES)
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=discover_targets(model, options.lora_targets, full_parts),
        exclude_modules=rf".*\b({'|'.join(TOWER_MODULES)})\b.*" if has_tower else None,
        bias="none",
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        lora_bias=options.lora_bias,
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if full_parts.has(name):
            parameter.requires_grad_()
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # PEFT takes float32 beside 4-bit weights
    config.base_model_name_or_path = base_name  # PEFT takes the folder, which for a hub id is this machine's own
    return adapted


def describe(model: PeftModel, base_parameters: int, full_parts: Parts = NO_PARTS) -> str:
    """One line on what is trained: modules, parameters, share of these and the base's."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = trained + base_parameters
    modules = sum(1 for name, _ in model.named_modules() if name.endswith(".lora_A.default"))
    targets = ", ".join(sorted(model.peft_config["default"].target_modules))
    full = f"; in full: {full_parts}" if full_parts else ""
    return f"LoRA on {modules} modules, {trained:,} of {whole:,} parameters ({trained / whole:.2%}): {targets}{full}"
