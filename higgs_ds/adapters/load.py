"""Read an adapter from disk without PEFT's model classes, and apply it to a weight or to an input."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
    QUANTIZATION_KEY,
    digest,
)
from higgs_ds.common.errors import InputError
from higgs_ds.common.resources import command
from higgs_ds.common.run_files import ADAPTER_FOLDER, TRAINED_FOLDER
from higgs_ds.model.fully_trained import NOTHING_FULLY_TRAINED, FullyTrained, is_own_weight
from higgs_ds.model.layouts import native_name
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.model.quantization import BaseQuantization, is_quantized_weight

PEFT_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
_OTHER_PARTS = {".lora_B.bias": "bias", ".lora_magnitude_vector": "magnitude"}
_NATIVE_PREFIXES = ("model.", "text_lm_head.", "audio_lm_head.")


@dataclass
class Factors:
    """The adapter of one linear layer: A (r, in), B (out, r); optional: B's bias (out,) and DoRA's row norms (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter's factors by the name of the weight that they adapt, and how its base was quantized, if it was.

    `scaling`: the factor of each product B A; `layers`: the layer's name in the adapter's file. By the same names.
    `full`: what was fully trained beside it; `full_weights`: these weights, by their names in the base.
    """

    factors: dict[str, Factors]
    scaling: dict[str, float]
    layers: dict[str, str]
    quantization: BaseQuantization | None
    full: FullyTrained = NOTHING_FULLY_TRAINED
    full_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    in_original_names: bool = False  # whether its file uses the layer names of the original layout
    strength: float = 1.0  # a factor of its whole change, which `scaling` includes
    values: LoraValues = field(default_factory=LoraValues)
    record: Record = field(default_factory=Record)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by PEFT's names for them in a file, in the native layout."""
        tensors = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in self.full_weights.items()}
        for name, factors in self.factors.items():
            layer = f"{PEFT_PREFIX}{name.removesuffix('.weight')}"
            tensors |= {f"{layer}{_LORA_A}": factors.a, f"{layer}{_LORA_B}": factors.b}
            optional = {suffix: getattr(factors, part) for suffix, part in _OTHER_PARTS.items()}
            tensors |= {f"{layer}{suffix}": tensor for suffix, tensor in optional.items() if tensor is not None}
        return tensors

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight (out, in) with its adapter, float32: W + scaling x B A (Hu et al. 2021, arXiv 2106.09685).

        With DoRA, each row is scaled to its trained norm (Liu et al. 2024, arXiv 2402.09353).
        """
        merged, magnitude = self._add_product(name, weight), self.factors[name].magnitude
        return merged if magnitude is None else merged * self._row_scale(magnitude, merged)[:, None]

    def _add_product(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        factors = self.factors[name]
        return torch.addmm(weight.float(), factors.b.float(), factors.a.float(), alpha=self.scaling[name])

    @staticmethod
    def _row_scale(magnitude: torch.Tensor, summed: torch.Tensor) -> torch.Tensor:
        return magnitude.float() / torch.linalg.norm(summed, dim=1)

    def bias(self, name: str) -> torch.Tensor | None:
        """Return what the adapter adds to a layer's bias, float32 (out,); None if it adds nothing."""
        bias = self.factors[name].bias
        return None if bias is None else self.scaling[name] * bias.float()

    def forward(self, name: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Apply an adapted layer, without the layer's own bias and without merging, to x (..., in), in float32."""
        factors = self.factors[name]
        product = F.linear(F.linear(x, factors.a.float()), factors.b.float())
        y = F.linear(x, weight.float()) + product * self.scaling[name]
        if factors.magnitude is not None:
            y *= self._row_scale(factors.magnitude, self._add_product(name, weight))
        bias = self.bias(name)
        return y if bias is None else y + bias


class BaseWeights:
    """The weights that an adapter was trained on; `differing` names those that quantize differently here."""

    def __init__(self, quantization: BaseQuantization | None, dequantized: bool) -> None:
        self.dequantized = dequantized
        self.dtype = quantization.dtype if quantization else torch.bfloat16
        self.digests = quantization.digests if quantization else {}
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.quantized = 0
        self.differing: list[str] = []

    def is_quantized(self, name: str) -> bool:
        return self.dequantized and is_quantized_weight(name)

    def as_trained(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a base weight in float32 on the CPU, quantized and dequantized if the model held it in 4 bits."""
        if not self.is_quantized(name):
            return weight.float()
        from higgs_ds.model import nf4

        quantized = nf4.quantize(weight.to(self.device), self.dtype)
        self.quantized += 1
        if self.digests and nf4.digest(quantized) != self.digests.get(name):
            self.differing.append(name)
        return nf4.dequantize(quantized).cpu().float()


@dataclass(frozen=True)
class _AdapterFiles:
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


def read_adapter(folder: Path, strength: float = 1.0) -> Adapter:
    """Read a LoRA adapter.

    Args:
        strength: what --lora_scale says: a finite factor of the adapter's change of the weights.

    Raises:
        InputError: the folder is not a LoRA adapter, or is damaged or of a kind that cannot be merged; the message
            says what to give instead. Or its change cannot be multiplied by `strength`.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(_describe_non_adapter(folder))
    try:
        files = _read_files(folder)
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder}: its adapter cannot be read: {error}") from error
    problems = _problems_of(files) + ([] if strength == 1 else _why_not_scalable(files, strength))
    if problems:
        raise InputError([f"{folder}: {problem}" for problem in problems])
    factors, _ = files.pairs()
    values = LoraValues.of(files.written)
    layers = {str(name_in_base(f"{layer}.weight")): layer for layer in factors}
    full_weights = {str(name_in_base(name)): files.tensors[name] for name in sorted(files.full_names())}
    return Adapter(
        factors={name: factors[layer] for name, layer in layers.items()},
        scaling={name: strength * values.scaling(layer) for name, layer in layers.items()},
        layers=layers,
        quantization=files.quantization,
        full=FullyTrained.of(full_weights, files.full_parts),
        full_weights=full_weights,
        in_original_names=files.in_original_names(),
        strength=strength,
        values=values,
        record=files.record,
    )


def _read_files(folder: Path) -> _AdapterFiles:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        metadata = file.metadata() or {}
    record, parts = metadata.get(QUANTIZATION_KEY), metadata.get(PARTS_KEY)
    written = _read_config(folder)
    quantization = BaseQuantization.from_json(record) if record else None
    return _AdapterFiles(
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
        layer = name.removesuffix(_LORA_A)
        if layer == name or layer + _LORA_B not in rest:
            continue
        parts = {part: rest.pop(layer + suffix, None) for suffix, part in _OTHER_PARTS.items()}
        factors[layer.removeprefix(PEFT_PREFIX)] = Factors(rest.pop(name), rest.pop(layer + _LORA_B), **parts)
    return factors, sorted(rest)


def _problems_of(files: _AdapterFiles) -> list[str]:
    """Return why an adapter cannot be used, whatever its base."""
    factors, unpaired = files.pairs()
    problems = find_problems(files.written, files.saved_modules())
    unknown = [name for name in files.tensors if name_in_base(name) is None]
    problems += [f"{name} is not a tensor of a Higgs Audio v2 model" for name in unknown]
    problems += [f"{name} {_why_unpaired(name)}" for name in unpaired]
    problems += [f"{name} holds NaN or infinity" for name, t in files.tensors.items() if not t.isfinite().all()]
    if not factors:
        problems.append(f"{ADAPTER_WEIGHTS} holds no LoRA tensors")
    return problems or _contradictions(LoraValues.of(files.written), factors)


def _why_not_scalable(files: _AdapterFiles, strength: float) -> list[str]:
    given, problems = f"--lora_scale {strength:g}", []
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


def check_fit(adapter: Adapter, shapes: dict[str, tuple[int, ...]], adapter_folder: Path, base_folder: Path) -> None:
    """Raise InputError unless a base with tensors of these `shapes` has every layer that an adapter adapts."""
    problems = []
    for name, factors in adapter.factors.items():
        a, b = factors.a, factors.b
        if name not in shapes:
            problems.append(f"{adapter_folder}: adapts {name}, which the base {base_folder} does not have")
        elif (b.shape[0], a.shape[1]) != shapes[name] or a.shape[0] != b.shape[1]:
            problems.append(
                f"{adapter_folder}: adapts {name} as {b.shape[0]} x {a.shape[1]}, but in the base it is {shapes[name]}"
            )
        elif factors.bias is not None and name.removesuffix("weight") + "bias" not in shapes:
            problems.append(f"{adapter_folder}: has a bias for {name}, but the base's layer has none")
    problems += [
        f"{adapter_folder}: holds {name} as {tuple(tensor.shape)}, but in the base it is {shapes[name]}"
        for name, tensor in adapter.full_weights.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    if problems:
        raise InputError(problems)


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
