"""Read an adapter from disk without PEFT's model classes, and apply it to a weight or to an input."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from higgs_ds.adapters.files import (
    LORA_A,
    LORA_B,
    OTHER_FACTORS,
    PEFT_PREFIX,
    Factors,
    name_in_base,
    problems_of,
    read_files,
    why_not_scalable,
)
from higgs_ds.adapters.lora_config import LoraValues
from higgs_ds.adapters.origin import Record
from higgs_ds.common.errors import InputError
from higgs_ds.model.fully_trained import NOTHING_FULLY_TRAINED, FullyTrained
from higgs_ds.model.quantization import BaseQuantization, is_quantized_weight


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
            tensors |= {f"{layer}{LORA_A}": factors.a, f"{layer}{LORA_B}": factors.b}
            optional = {suffix: getattr(factors, part) for suffix, part in OTHER_FACTORS.items()}
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


def read_adapter(folder: Path, strength: float = 1.0) -> Adapter:
    """Read a LoRA adapter.

    Args:
        strength: what --lora_scale says: a finite factor of the adapter's change of the weights.

    Raises:
        InputError: the folder is not a LoRA adapter, or is damaged or of a kind that cannot be merged; the message
            says what to give instead. Or its change cannot be multiplied by `strength`.
    """
    files = read_files(folder)
    problems = problems_of(files) + ([] if strength == 1 else why_not_scalable(files, strength))
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
