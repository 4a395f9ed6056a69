"""Compare a merged model with its base and adapter, layer by layer from the files: neither model is ever in memory.

The logits show that all layers are merged, but with the adapter as this project reads it. The weights of one layer of
each kind are therefore also compared with what PEFT itself makes of the base and the adapter.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from higgs_ds.adapters.files import PEFT_PREFIX
from higgs_ds.adapters.load import Adapter, BaseWeights
from higgs_ds.adapters.save import ADAPTER_WEIGHTS
from higgs_ds.common.errors import SaveError
from higgs_ds.common.files import release_freed_memory
from higgs_ds.common.tensor_files import read_rows, read_tensor, weight_locations, weight_shapes
from higgs_ds.model.config import read_config, with_parts
from higgs_ds.model.families import family_of
from higgs_ds.model.streaming import streaming_model

ROWS_AT_ONCE = 2**22  # elements of a weight that are in memory at once
ORDER_OF_SUMS = 1e-5  # relative difference of sums in float32 that are added up in another order


@dataclass
class Agreement:
    """How far the logits of two models differ. `relative`: RMS of the difference divided by RMS of the logits."""

    max_difference: float
    largest_logit: float
    relative: float
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return (
            f"merged and adapted logits differ by {self.max_difference:.2g} at most, {self.relative:.2%} on average, "
            f"with logits of up to {self.largest_logit:.3g}{note}"
        )


def compare_merged(base_folder: Path, merged_folder: Path, adapter: Adapter, base: BaseWeights) -> Agreement:
    """Compare the logits of both models, in float32, for a random sequence of text and frames."""
    config = with_parts(read_config(base_folder), adapter.full.parts)
    expected = _probe_logits(config, AdaptedWeightFiles(base_folder, adapter, base))
    found = _probe_logits(read_config(merged_folder), Files(merged_folder))
    difference = found - expected
    return Agreement(
        max_difference=float(difference.abs().max()),
        largest_logit=float(expected.abs().max()),
        relative=float(difference.square().mean().sqrt() / expected.square().mean().sqrt()),
    )


class Files:
    """The weights in a model's files, as `streaming_model` reads them."""

    def __init__(self, folder: Path) -> None:
        self.places = weight_locations(folder)
        self.shapes = weight_shapes(sorted(set(self.places.values())))

    def tensor(self, name: str) -> torch.Tensor:
        return read_tensor(self.places[name], name).float()

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.slice(name, i, i + 1)[0] for i in ids.flatten().tolist()]).view(*ids.shape, -1)

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop` (exclusive) of a weight, in float32."""
        return read_rows(self.places[name], name, start, stop).float()

    def has(self, name: str) -> bool:
        return name in self.places

    def dtype(self, name: str) -> torch.dtype:
        return read_rows(self.places[name], name, 0, 1).dtype

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{layer}.weight"
        out_features, in_features = self.shapes[name]
        step = max(1, ROWS_AT_ONCE // in_features)
        y = x.new_empty(*x.shape[:-1], out_features)
        for start in range(0, out_features, step):
            stop = min(start + step, out_features)
            y[..., start:stop] = F.linear(x, self.slice(name, start, stop))
            release_freed_memory()
        return self.biased(layer, y)

    def biased(self, layer: str, y: torch.Tensor) -> torch.Tensor:
        """Return y plus the layer's own bias, if it has one."""
        release_freed_memory()
        return y + self.tensor(f"{layer}.bias") if self.has(f"{layer}.bias") else y


class AdaptedWeightFiles(Files):
    """The same with an adapter, which is applied without being merged."""

    def __init__(self, folder: Path, adapter: Adapter, base: BaseWeights) -> None:
        super().__init__(folder)
        self.adapter, self.base = adapter, base
        self.shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.full_weights.items()}

    def tensor(self, name: str) -> torch.Tensor:
        trained = self.adapter.full_weights.get(name)
        return super().tensor(name) if trained is None else trained.float()

    def slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        trained = self.adapter.full_weights.get(name)
        return super().slice(name, start, stop) if trained is None else trained[start:stop].float()

    def has(self, name: str) -> bool:
        return super().has(name) or name in self.adapter.full_weights

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        name = f"{layer}.weight"
        if name not in self.adapter.factors and not self.base.is_quantized(name):
            return super().linear(layer, x)
        weight = self.base.as_trained(name, read_tensor(self.places[name], name))
        adapted = name in self.adapter.factors
        return self.biased(layer, self.adapter.forward(name, weight, x) if adapted else F.linear(x, weight))


def _probe_logits(config: Any, source: Files) -> torch.Tensor:
    return family_of(config.model_type).probe(streaming_model(config, source), config)


def compare_with_peft(
    base_folder: Path, merged_folder: Path, adapter_folder: Path, adapter: Adapter, base: BaseWeights
) -> None:
    """Compare some merged layers, in float32, with what PEFT makes of the base and the adapter.

    One base weight is in memory at a time. PEFT, which makes several copies, gets a part of it.

    Raises:
        SaveError: a merged weight differs by more than rounding, or PEFT cannot load the adapter.
    """
    source, merged, strength = Files(base_folder), Files(merged_folder), adapter.strength
    for name in _layers_to_compare(adapter):
        layer = adapter.layers[name]
        linear = _base_linear(source, name, base)
        tensors = _tensors_of_layer(adapter_folder, layer)
        sums = {leaf: _Differences(f"{name.removesuffix('weight')}{leaf}") for leaf in linear.state_dict()}
        step = max(1, ROWS_AT_ONCE // linear.in_features)
        for start in range(0, linear.out_features, step):
            rows = slice(start, min(start + step, linear.out_features))
            for leaf, expected in _rows_merged_by_peft(linear, rows, layer, tensors, adapter_folder, strength).items():
                sums[leaf].add(expected, merged, rows)
        for found in sums.values():
            if not found.relative <= found.rounding:
                raise SaveError(
                    f"{merged_folder}: {found.name} differs from what PEFT makes of {base_folder} and "
                    f"{adapter_folder}, by {found.relative:.2%} on average; rounding explains {found.rounding:.2%}"
                )
        release_freed_memory()


def _layers_to_compare(adapter: Adapter) -> list[str]:
    """Return the first weight of each kind, such as `q_proj`, and the first of each rank and scaling."""
    first: dict[object, str] = {}
    for name, factors in adapter.factors.items():
        first.setdefault(re.sub(r"\.\d+\.", ".N.", name), name)
        first.setdefault((len(factors.a), adapter.scaling[name]), name)
    return list(dict.fromkeys(first.values()))


def _base_linear(source: Files, name: str, base: BaseWeights) -> nn.Linear:
    """Return a linear layer of the base in float32, as the adapter is added to it."""
    bias = name.removesuffix("weight") + "bias"
    weight = base.as_trained(name, read_tensor(source.places[name], name))
    return _linear(weight, source.tensor(bias) if source.has(bias) else None)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _tensors_of_layer(adapter_folder: Path, layer: str) -> dict[str, torch.Tensor]:
    """Return a layer's tensors in an adapter's file, by their names in the model."""
    with safe_open(adapter_folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = {name: name.removeprefix(PEFT_PREFIX) for name in file.keys()}  # noqa: SIM118 - it has no __iter__
        return {short: file.get_tensor(name) for name, short in names.items() if short.startswith(f"{layer}.")}


def _rows_merged_by_peft(
    linear: nn.Linear,
    rows: slice,
    layer: str,
    tensors: dict[str, torch.Tensor],
    adapter_folder: Path,
    strength: float,
) -> dict[str, torch.Tensor]:
    """Return rows of a layer's weight and bias, merged by PEFT alone.

    PEFT gets a model that contains only these rows of this layer, and does with it what it does with a whole model.
    Rows of a merged weight do not depend on each other, neither in LoRA nor in DoRA.

    Args:
        layer: the layer's name in the model that the adapter was trained with.
        tensors: the adapter's tensors for this layer.

    Raises:
        SaveError: PEFT does not adapt this layer, or cannot load its tensors.
    """
    from peft import LoraConfig, LoraModel, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    part = _linear(linear.weight[rows].clone(), None if linear.bias is None else linear.bias[rows].clone())
    model = _model_of_one(layer, part)
    of_rows = {name: tensor if ".lora_A." in name else tensor[rows] for name, tensor in tensors.items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT first draws random factors
        warnings.simplefilter("ignore")  # they are about a whole model
        try:
            config = LoraConfig.from_pretrained(str(adapter_folder))
            config.modules_to_save = None
            inject_adapter_in_model(config, model)
            result = set_peft_model_state_dict(model, of_rows)
        except (ValueError, TypeError, RuntimeError) as error:
            raise SaveError(f"{adapter_folder}: PEFT cannot load {layer}: {error}") from error
    missing = [key for key in result.missing_keys if LoraModel.prefix in key]
    if missing or result.unexpected_keys:
        raise SaveError(f"{adapter_folder}: PEFT misses {missing} in {layer} and ignores {result.unexpected_keys}")
    adapted = model.get_submodule(layer)
    assert isinstance(adapted, LoraLayer)
    adapted.scale_layer(strength)
    adapted.merge()
    return part.state_dict()


def _model_of_one(layer: str, module: nn.Module) -> nn.Module:
    """Return a model whose only layer is `module`, under the dotted name `layer`."""
    for part in reversed(layer.split(".")):
        parent = nn.Module()
        parent.add_module(part, module)
        module = parent
    return module


class _Differences:
    """How far a merged tensor differs from what it is expected to be, as RMS divided by the RMS of what is expected."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = torch.float32
        self.count = 0
        self.squares = torch.zeros(2, dtype=torch.float64)  # of the difference, and of what is expected

    def add(self, expected: torch.Tensor, merged: Files, rows: slice) -> None:
        self.dtype = merged.dtype(self.name)
        difference = merged.slice(self.name, rows.start, rows.stop) - expected.to(self.dtype).float()
        self.squares += torch.stack([difference.double().square().sum(), expected.double().square().sum()])
        self.count += expected.numel()

    @property
    def relative(self) -> float:
        return 0.0 if self.squares[0] == 0 else float((self.squares[0] / self.squares[1]).sqrt())

    @property
    def rounding(self) -> float:
        """The difference that rounding to the tensor's dtype can cause between two sums of the same numbers.

        Numbers that differ by a fraction d of their size are rounded differently in d / eps of the cases, then by eps.
        """
        eps = torch.finfo(self.dtype).eps
        return ORDER_OF_SUMS + math.sqrt(ORDER_OF_SUMS * eps) + 4 * eps / math.sqrt(self.count)
