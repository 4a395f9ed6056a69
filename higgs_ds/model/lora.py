"""LoRA by PEFT. Targets are discovered in the model and reported; one that is missing in some layers is an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedConfig

from higgs_ds.common.errors import InputError
from higgs_ds.model.families import family_of_weight
from higgs_ds.model.fully_trained import FullyTrained
from higgs_ds.model.parts import NO_PARTS, TOWER_MODULES, Parts
from higgs_ds.options.train import LoraOptions

_LAYER_LINEAR = re.compile(r"^(\w+\.layers)\.(\d+)\.((\w+)\.\w+)$")


def _groups_of(match: re.Match[str]) -> tuple[str, ...]:
    """Return the --lora_targets groups of a linear layer of the decoder: an FFN may be of both kinds of positions."""
    return family_of_weight(match[0]).groups.get(match[4], ())


def discover_targets(model: nn.Module, groups: Sequence[str], excluded: Parts = NO_PARTS) -> list[str]:
    """Return the names, relative to the layer (`audio_mlp.up_proj`), of the decoder's linear layers in `groups`.

    `mlp.up_proj` does not match `audio_mlp.up_proj`: PEFT matches a suffix only after a dot.

    Raises:
        InputError: a group has no module, or a module is missing in some layers.
    """
    found: Counter[str] = Counter()
    layers = set()
    present: set[str] = set()
    for name, module in model.named_modules():
        match = _LAYER_LINEAR.match(name)
        if match is None or not isinstance(module, nn.Linear) or excluded.has(name):
            continue
        layers.add(match[2])
        chosen = set(_groups_of(match)).intersection(groups)
        if chosen:
            found[match[3]] += 1
            present |= chosen
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


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with an adapter: its name in a native model, the adapter's rank, and the numerator of its scaling."""

    name: str
    rank: int
    alpha: float


def groups_of_layer(name: str) -> tuple[str, ...]:
    """Return the --lora_targets groups of a layer; none if it is not a linear layer of the decoder."""
    match = _LAYER_LINEAR.match(name)
    return _groups_of(match) if match else ()


def in_every_layer(adapted: Iterable[AdaptedLayer], num_layers: int) -> tuple[AdaptedLayer, ...]:
    """Return adapters that are alike in each of `num_layers` decoder layers; of different ranks, the largest is used.

    All names must be of the decoder's linear layers.
    """
    largest = {_in_layer(layer.name): layer for layer in sorted(adapted, key=lambda layer: layer.rank)}
    return tuple(
        replace(layer, name=f"{_split(layer.name)[1]}.{number}.{name}")
        for number in range(num_layers)
        for name, layer in largest.items()
    )


def _split(name: str) -> re.Match[str]:
    match = _LAYER_LINEAR.match(name)
    assert match
    return match


def _in_layer(name: str) -> str:
    return _split(name)[3]


def _targets(model: nn.Module, options: LoraOptions, adapted: Collection[AdaptedLayer]) -> dict[str, Any]:
    """Return the values of PEFT's configuration for these layers: short ones if all decoder layers are alike."""
    num_layers = len({match[2] for name, _ in model.named_modules() if (match := _LAYER_LINEAR.match(name))})
    if set(adapted) == set(in_every_layer(adapted, num_layers)):
        named = {_in_layer(layer.name): (re.escape(_in_layer(layer.name)), layer) for layer in adapted}
    else:
        named = {layer.name: (f"^{re.escape(layer.name)}", layer) for layer in adapted}
    return {
        "target_modules": sorted(named),
        "rank_pattern": {key: layer.rank for key, layer in named.values() if layer.rank != options.lora_r},
        "alpha_pattern": {key: layer.alpha for key, layer in named.values() if layer.alpha != options.lora_alpha},
    }


def check_biases(config: PreTrainedConfig, options: LoraOptions) -> None:
    """Raise InputError if adapters are to have biases, but the layers have no bias to merge them into."""
    groups_without_bias = [
        group
        for group in options.lora_targets
        if not (config.attention_bias if group == "attention" else config.mlp_bias)
    ]
    if options.lora_bias and groups_without_bias:
        raise InputError(
            f"--lora_bias: the base's layers in {', '.join(groups_without_bias)} have no bias, so the adapter's biases "
            "could not be merged; omit this option"
        )


def add_lora(
    model: nn.Module,
    options: LoraOptions,
    base_name: str,
    dtype: torch.dtype,
    full_parts: Parts = NO_PARTS,
    adapted: Collection[AdaptedLayer] = (),
) -> PeftModel:
    """Wrap a frozen model with adapters of `dtype`. Their second factor starts at 0, so the outputs do not change.

    The modules of `full_parts` and of --also_train get no adapters; their own parameters are unfrozen. If layers are
    given as `adapted`, these get adapters, instead of --lora_targets.

    No task type is given, because PEFT would then pass `labels` to a forward that has none. The adapters are not upcast
    to float32 (PEFT's default), because the engine keeps float32 master weights for them.
    """
    # Layers of the tower have the same names as those of the decoder.
    has_tower = any(module in name.split(".") for name, _ in model.named_modules() for module in TOWER_MODULES)
    if adapted:
        targets = _targets(model, options, adapted)
    else:
        targets = {"target_modules": discover_targets(model, options.lora_targets, full_parts)}
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        exclude_modules=rf".*\b({'|'.join(TOWER_MODULES)})\b.*" if has_tower else None,
        bias="none",
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        lora_bias=options.lora_bias,
        **targets,
    )
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    unfreeze(model, FullyTrained(full_parts, options.also_train).has, "--also_train")
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)  # PEFT uses float32 next to 4-bit weights
    config.base_model_name_or_path = base_name  # PEFT records the folder, for a hub id a local path
    return peft_model


def unfreeze(model: nn.Module, is_trained: Callable[[str], bool], asked_by: str) -> None:
    """Unfreeze the weights of a model for whose names `is_trained` is true.

    Raises:
        InputError: two names share one weight, and only one of them is trained; names the option `asked_by`.
    """
    trained_by_weight: dict[int, set[bool]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trained = is_trained(name)
        trained_by_weight.setdefault(id(parameter), set()).add(trained)
        if trained:
            parameter.requires_grad_()
    if any(len(trained) > 1 for trained in trained_by_weight.values()):
        raise InputError(f"{asked_by}: the base shares one weight between two groups; give both groups or neither")


def describe(model: PeftModel, base_parameters: int, full: FullyTrained) -> str:
    """Describe what is trained, in one line: adapted modules, trained parameters and their share of all parameters."""
    own = FullyTrained(groups=full.groups)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = trained - sum(p.numel() for name, p in model.get_base_model().named_parameters() if own.has(name))
    total = added + base_parameters
    modules = [name for name, _ in model.get_base_model().named_modules() if name.endswith(".lora_A.default")]
    targets = ", ".join(sorted({_in_layer(name.removesuffix(".lora_A.default")) for name in modules}))
    targets += f"; fully fine-tuned: {full}" if full else ""
    return f"LoRA on {len(modules)} modules, {trained:,} of {total:,} parameters ({trained / total:.2%}): {targets}"
