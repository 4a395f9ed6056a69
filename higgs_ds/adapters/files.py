"""The two files of an adapter: what they hold, and why they cannot be used. Without PEFT, whose import is slow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from higgs_ds.adapters.lora_config import LoraValues, find_problems
from higgs_ds.adapters.origin import Record, origins_from_json
from higgs_ds.adapters.save import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_KEY,
    DIGEST_KEY,
    ORIGINS_KEY,
    PARTS_KEY,
    PEFT_PREFIX,
    QUANTIZATION_KEY,
    digest,
)
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import command
from higgs_ds.common.run_files import ADAPTER_FOLDER, TRAINED_FOLDER
from higgs_ds.model.families import FAMILIES, native_name
from higgs_ds.model.fully_trained import FullyTrained, is_own_weight
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.model.quantization import BaseQuantization

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
OTHER_FACTORS = {".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude"}
_NATIVE_PREFIXES = tuple(prefix for family in FAMILIES for prefix in family.name_prefixes)


@dataclass
class Factors:
    """The adapter of one linear layer: A (r, in), B (out, r); optional: B's bias (out,) and DoRA's row norms (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class AdapterFiles:
    """What the two files of an adapter hold."""

    tensors: dict[str, torch.Tensor]
    written: dict[str, Any]  # adapter_config.json
    quantization: BaseQuantization | None
    full_parts: Parts
    record: Record

    def pairs(self) -> tuple[dict[str, Factors], list[str]]:
        """Return the factors by the names of their layers in the file, and the names of tensors without a pair."""
        full = self.full_names()
        return _pair_factors({name: tensor for name, tensor in self.tensors.items() if name not in full})

    def full_names(self) -> set[str]:
        """Return the names of the tensors that are whole weights."""
        return {name for name in self.tensors if self.full_parts.has(name) or is_own_weight(name_in_base(name))}

    def saved_modules(self) -> list[str]:
        """Return the values of `modules_to_save` that PEFT fills from these tensors, if every whole weight has one."""
        modules = [name.removeprefix(PEFT_PREFIX).removesuffix(".weight") for name in self.full_names()]
        saved = [value for value in self.written.get("modules_to_save") or [] if isinstance(value, str)]
        of_parts = self.full_parts.modules

        def is_filled(value: str) -> bool:
            return value in of_parts or any(module.endswith(value) for module in modules)

        def is_saved(module: str) -> bool:
            return self.full_parts.has(module) or module.endswith(tuple(saved))

        return list(filter(is_filled, saved)) if all(map(is_saved, modules)) else of_parts

    def in_original_names(self) -> bool:
        return any(not _is_native(name) for name in self.tensors)


def read_files(folder: Path) -> AdapterFiles:
    """Read the files of an adapter, whatever they hold.

    Raises:
        InputError: the folder is not an adapter, which says what to give instead, or it cannot be read.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(_describe_non_adapter(folder))
    try:
        return _read_files(folder)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: its adapter cannot be read: {error}") from error


def _read_files(folder: Path) -> AdapterFiles:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    record, parts = metadata.get(QUANTIZATION_KEY), metadata.get(PARTS_KEY)
    written = _read_config(folder)
    quantization = BaseQuantization.from_json(record) if record else None
    return AdapterFiles(
        tensors,
        written,
        quantization,
        Parts.from_json(parts) if parts else NO_PARTS,
        Record(
            sha256=_check_digest(folder, tensors, metadata, written),
            is_ours=DIGEST_KEY in metadata,
            base=str(written.get("base_model_name_or_path") or "") or None,
            base_weights=metadata.get(BASE_KEY),
            origins=origins_from_json(metadata.get(ORIGINS_KEY, "[]")),
        ),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    written = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if not isinstance(written, dict):
        raise ValueError(f"{ADAPTER_CONFIG} is not a JSON object")
    return written


def _check_digest(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], written: dict[str, Any]
) -> str:
    """Return the files' digest. Raises InputError if they record another one; an adapter without a record passes."""
    found = digest(tensors, written, metadata.get(QUANTIZATION_KEY))
    if metadata.get(DIGEST_KEY, found) != found:
        raise InputError(
            f"{folder}: {ADAPTER_WEIGHTS} or {ADAPTER_CONFIG} has changed since it was written: it is damaged, half "
            "copied or edited; copy both files again from the training output"
        )
    return found


def _pair_factors(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Factors], list[str]]:
    """Return the factors by the names of their layers in the file, and the names of tensors without factors."""
    rest = dict(tensors)
    factors = {}
    for name in sorted(tensors):
        layer = name.removesuffix(LORA_A)
        if layer == name or layer + LORA_B not in rest:
            continue
        parts = {part: rest.pop(layer + suffix, None) for suffix, part in OTHER_FACTORS.items()}
        factors[layer.removeprefix(PEFT_PREFIX)] = Factors(rest.pop(name), rest.pop(layer + LORA_B), **parts)
    return factors, sorted(rest)


def problems_of(files: AdapterFiles) -> list[str]:
    """Return why an adapter cannot be used, whatever its base."""
    factors, unpaired = files.pairs()
    problems = find_problems(files.written, files.saved_modules())
    unknown = [name for name in files.tensors if name_in_base(name) is None]
    problems += [f"{name} is not a tensor of a Higgs Audio model" for name in unknown]
    problems += [f"{name} {_why_unpaired(name)}" for name in unpaired]
    problems += [f"{name} holds NaN or infinity" for name, t in files.tensors.items() if not t.isfinite().all()]
    if not factors:
        problems.append(f"{ADAPTER_WEIGHTS} holds no LoRA tensors")
    return problems or _contradictions(LoraValues.of(files.written), factors)


def why_not_scalable(files: AdapterFiles, strength: float, option: str = "--lora_scale") -> list[str]:
    given, problems = f"{option} {strength:g}", []
    if files.written.get("use_dora"):
        problems.append(
            f"{given}: use_dora is True, and DoRA, which also sets the norms of rows, has no strength but 1"
        )
    full = FullyTrained.of([str(name_in_base(name)) for name in files.full_names()], files.full_parts)
    if full:
        problems.append(f"{given}: {full} was fully trained with the adapter, and has no strength but 1")
    return problems


def _why_unpaired(name: str) -> str:
    if ".lora_embedding_" in name:
        return "is LoRA on an embedding, which cannot be merged here; leave embeddings out of target_modules"
    return "does not belong to a LoRA pair"


def _contradictions(values: LoraValues, factors: dict[str, Factors]) -> list[str]:
    """Return where the tensors are not those of the configuration, which PEFT then loads in part or not at all."""
    problems = []
    for layer, of_layer in factors.items():
        if len(of_layer.a) != values.rank(layer):
            problems.append(f"{layer} has rank {len(of_layer.a)}, but rank {values.rank(layer)} in {ADAPTER_CONFIG}")
        for key, is_used, tensor in (
            ("use_dora", values.use_dora, of_layer.magnitude),
            ("lora_bias", values.lora_bias, of_layer.bias),
        ):
            if is_used != (tensor is not None):
                has = "has no" if is_used else "has a"
                problems.append(f"{layer} {has} tensor for {key}, which is {is_used} in {ADAPTER_CONFIG}")
    return problems


def _is_native(name: str) -> bool:
    return name.removeprefix(PEFT_PREFIX).startswith(_NATIVE_PREFIXES)


def name_in_base(name: str) -> str | None:
    """Return the native base's name of a tensor in an adapter's file, which may use the names of either layout.

    None if neither layout has such a name.
    """
    if _is_native(name):
        return name.removeprefix(PEFT_PREFIX)
    try:
        return native_name(name.removeprefix(PEFT_PREFIX))
    except KeyError:
        return None


def _describe_non_adapter(folder: Path) -> str:
    nearby = sorted({path.parent for parent in (folder, folder.parent) for path in _adapters_below(parent)})
    where = "; adapters nearby: " + ", ".join(map(str, nearby)) if nearby else ""
    if (folder / TRAINED_FOLDER).is_dir():
        return f"{folder}: is a checkpoint of full fine-tuning, not an adapter; {command('export')} makes a model of it"
    if folder.name.startswith("checkpoint-"):
        return (
            f"{folder}: is a checkpoint directory, for resuming training (--resume), not an adapter; give the adapter "
            f"directory, {folder / ADAPTER_FOLDER}{where}"
        )
    return f"{folder}: is not an adapter: it holds no {ADAPTER_CONFIG}{where}"


def _adapters_below(folder: Path) -> Iterable[Path]:
    return [*folder.glob(ADAPTER_CONFIG), *folder.glob(f"*/{ADAPTER_CONFIG}")]
