"""Read a base: its configuration and its weights, in full precision or in 4 bits, and check that the two match."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import release_freed_memory
from higgs_ds.common.precision import FP16, native_precision
from higgs_ds.common.tensor_files import read_tensor, weight_files, weight_locations, weight_shapes
from higgs_ds.model import nf4
from higgs_ds.model.config import read_config, ready_for_parts
from higgs_ds.model.families import FAMILIES, family_of
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.model.quantization import BaseQuantization, is_quantized_weight

disable_progress_bar()  # over the tensors of a model; errors and warnings stay


def check_weights(folder: Path) -> None:
    """Raise InputError if a base lacks weights that the loss needs, or its files do not match its config."""
    found = weight_shapes(weight_files(folder))
    config = read_config(folder)
    missing = family_of(config.model_type).missing_weight(found)
    if missing:
        raise InputError(f"{folder}: {missing}")
    expected = empty_model(config, torch.float32).state_dict()
    _check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in expected.items()}, found)


def num_parameters(folder: Path, excluded: Parts = NO_PARTS) -> int:
    """Count the parameters of a base, without those of `excluded`, from the headers of its files."""
    shapes = weight_shapes(weight_files(folder))
    return sum(math.prod(shape) for name, shape in shapes.items() if not _is_unused(name) and not excluded.has(name))


def _is_unused(name: str) -> bool:
    """Return whether a file of a model may hold this tensor, which the model does not load."""
    return any(family.is_unused(name) for family in FAMILIES)


def load_base(folder: Path, dtype: torch.dtype, to_add: Parts = NO_PARTS) -> Any:
    """Load a frozen base on the CPU. Every weight that the loss needs must be in its files.

    The parts `to_add` are added later (`ExtendedModel.add_parts`).

    Raises:
        InputError: weights are missing, unexpected or have the wrong shape.
    """
    config = ready_for_parts(read_config(folder), to_add)
    family = family_of(config.model_type)
    model, info = family.model_class(config).from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **family.load_arguments
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(name for name in map(str, info[kind]) if not _is_unused(name))
        if found:
            names = ", ".join(found[:5])
            raise InputError(f"{folder}: {kind.replace('_', ' ')} in its weights: {names}")
    return model.requires_grad_(False)


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """Build a frozen model whose weights have shapes, but neither values nor memory."""
    config = copy.deepcopy(config)  # the model keeps the object, and the caller must not see the new dtype
    config.dtype = dtype
    with init_empty_weights(include_buffers=True):
        model = family_of(config.model_type).build(config)
    return model.to(dtype).requires_grad_(False)


def load_base_in_4bit(
    folder: Path, dtype: torch.dtype, quantize_on: torch.device, keep_on: torch.device, to_add: Parts = NO_PARTS
) -> tuple[Any, BaseQuantization]:
    """Load a frozen base, tensor by tensor: its decoder's linear layers in NF4, everything else in `dtype`.

    transformers' own loader keeps every file that it has read mapped until it returns: for a base of 2.1 GiB the
    process peaked at 2.58 GiB with that loader, and at 1.15 GiB with this one.

    Args:
        quantize_on: device on which weights are quantized.
        keep_on: device on which they are kept.
        to_add: parts that are added later, as in `load_base`.

    Raises:
        InputError: the files do not match the configuration.
    """
    paths = {name: path for name, path in weight_locations(folder).items() if not _is_unused(name)}
    config = ready_for_parts(read_config(folder), to_add)
    config.dtype = dtype
    with init_empty_weights():
        model = family_of(config.model_type).build(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    _check_shapes(folder, expected, weight_shapes(weight_files(folder)))
    nf4.replace_linears(model, dtype)
    quantized = {}
    for name, path in paths.items():
        layer, _, leaf = name.rpartition(".")
        tensor = read_tensor(path, name)
        if is_quantized_weight(name):
            weight = nf4.quantize(tensor.to(quantize_on), dtype)
            quantized[name] = weight
            nf4.fill(model.get_submodule(layer), weight)
            release_freed_memory()
        else:
            setattr(model.get_submodule(layer), leaf, nn.Parameter(tensor.to(keep_on, dtype), requires_grad=False))
    record = nf4.describe(quantized, dtype)
    for weight in quantized.values():
        weight.data = weight.data.to(keep_on)
    return model.requires_grad_(False), record


def _check_shapes(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(name for name in found.keys() - expected.keys() if not _is_unused(name)),
        "mismatched keys": [name for name in expected.keys() & found.keys() if expected[name] != found[name]],
    }
    if any(problems.values()):
        raise InputError(
            [f"{folder}: {kind} in its weights: {', '.join(names[:5])}" for kind, names in problems.items() if names]
        )


def load_for_generation(
    folder: Path, quantization: BaseQuantization | None, device: torch.device, to_add: Parts = NO_PARTS
) -> Any:
    """Load a model in the dtype of its files, as its users do, or in 4 bits for an adapter trained on such a base.

    Files in bf16 are loaded in fp16 on a GPU that does not compute in bf16.

    Args:
        to_add: parts that are added later, as in `load_base`.
    """
    if quantization is not None:
        model, _ = load_base_in_4bit(folder, quantization.dtype, device, device, to_add)
        return _with_generation_settings(model, folder).to(device)  # moves the buffers, too
    config = ready_for_parts(read_config(folder), to_add)
    in_fp16 = config.dtype == torch.bfloat16 and native_precision(device) == FP16
    dtype = torch.float16 if in_fp16 else "auto"
    family = family_of(config.model_type)
    model = family.model_class(config).from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True)
    return _with_generation_settings(model, folder).to(device)


def _with_generation_settings(model: Any, folder: Path) -> Any:
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
