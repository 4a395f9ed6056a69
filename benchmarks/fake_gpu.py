"""A forward and backward pass on a GPU that need not exist: torch computes shapes, dtypes and devices, but no values.

    python benchmarks/fake_gpu.py [--json]

Prints the number of operations of a decoder layer for each precision. An operation is a call that computes: views and
allocations are left out. Each launches at least one kernel, and most launch exactly one. What else a pass does is
recorded, too: transfers between the GPU and the host, products in float32, and operations that mix devices. An
operation whose result the host would have to wait for, such as `.item()`, raises an error of torch's.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import random_base
import sides
import torch
from record import parser_of, report
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from higgs_ds.model import dropout, fused_lora
from higgs_ds.model.offload import HostModule

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution", "aten._scaled_dot_product")
COPIES = ("aten._to_copy", "aten.copy_")
# Calls that launch nothing, beside views.
FREE = ("prim.", "aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")


class Operations(TorchDispatchMode):
    """Record what torch is asked to do within the block.

    calls: number of calls of each operation that computes.
    transfers: copies to another device, by direction, with shapes.
    float32_products: matrix products of float32 inputs, with shapes.
    mixed: operations other than copies with tensors on both devices; torch lets some of them pass, such as an index.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.transfers: list[str] = []
        self.float32_products: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        name, shapes = str(func), " ".join(str(tuple(tensor.shape)) for tensor in inputs)
        if not func.is_view and not name.startswith(FREE):
            self.calls[name] += 1
        if name.startswith(COPIES):
            kinds = [tensor.device.type for tensor in (*reversed(inputs), *outputs)]
            if len(set(kinds)) > 1:
                self.transfers.append(f"{kinds[0]} to {kinds[-1]}: {tuple(outputs[0].shape)}")
        elif len({tensor.device.type for tensor in inputs if tensor.dim()}) > 1:
            self.mixed.append(f"{name} {shapes}")
        if name.startswith(PRODUCTS) and _is_float32_product(inputs):
            self.float32_products.append(f"{name} {shapes}")
        return result


class FusedAttention(TorchFunctionMode):
    """Let attention be one operation, as on a GPU. Without a real one, torch computes it step by step in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, kwargs.get("attn_mask"), True, is_causal=kwargs.get("is_causal", False))[0]


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """Within the block, nothing asks for a real GPU: the state of its random generator is that of the CPU's."""
    state = {"generator_state": lambda _: torch.get_rng_state()}
    with (
        FusedAttention(),
        mock.patch.multiple(fused_lora, **state),
        mock.patch.multiple(dropout, **state, set_generator_state=lambda *_: None),
    ):
        yield


def _is_float32_product(inputs: list[torch.Tensor]) -> bool:
    """A sum over a dimension of 1 is left out: rotary embeddings multiply positions and frequencies in this way."""
    return any(tensor.dtype == torch.float32 and tensor.shape[-1] > 1 for tensor in inputs[:1])


def operations(
    model: nn.Module, batch: dict[str, torch.Tensor], num_parts: int, device: torch.device, backward: bool = False
) -> Operations:
    """Return the operations of a forward pass of a `DualLossModel`, which loses its parameters.

    Args:
        batch: the tensors of a `data.collate.Batch`.
        num_parts: number of parts of the loss.
        backward: also of the backward pass, for which torch needs a real GPU, or `device` to be the CPU.
    """
    with FakeTensorMode():
        _fake(model, device)
        arguments = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in batch.items()}
        weights = torch.ones(num_parts, device=device)
        with Operations() as recorded, _without_gpu() if device == GPU else contextlib.nullcontext():
            losses = model(**arguments, target_weights=weights)[0]
            if backward:
                losses.sum().backward()
    return recorded


def _fake(model: nn.Module, device: torch.device) -> None:
    """Replace all parameters and buffers of a model, and the statistics of 4-bit weights, by fake ones on a device."""
    for module in model.modules():
        if isinstance(module, HostModule):
            _fake(module.__dict__["on_host"], CPU)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake = nn.Parameter(_empty(parameter, device), parameter.requires_grad)
                if hasattr(parameter, "quant_state"):
                    module.quant_state = fake.quant_state = _fake_statistics(parameter.quant_state, device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _empty(buffer, device)


def _fake_statistics(state: Any, device: torch.device) -> Any:
    fake = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(fake, name, _empty(value, device))
    if state.state2 is not None:
        fake.state2 = _fake_statistics(state.state2, device)
    return fake


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def small_model(num_layers: int, precision: str, dropout: float) -> nn.Module:
    """Return a `DualLossModel` with adapters of rank 16 on all targets; widths do not change what is launched."""
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    from higgs_ds.model import nf4
    from higgs_ds.model.lora import add_lora
    from higgs_ds.model.quantization import is_quantized_weight
    from higgs_ds.model.v2.loss_model import DualLossModel
    from higgs_ds.options.train import LoraOptions

    dtype = random_base.torch_dtype("fp32" if precision == "fp32" else "bf16")
    config = HiggsAudioV2Config.from_dict(
        {
            "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": num_layers, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 2000,
        } | random_base.FIXED
    )  # fmt: skip
    higgs = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).to(dtype).requires_grad_(False)
    if precision == "nf4":
        weights = {name: weight for name, weight in higgs.named_parameters() if is_quantized_weight(name)}
        nf4.replace_linears(higgs, dtype)
        for name, weight in weights.items():
            nf4.fill(higgs.get_submodule(name.rpartition(".")[0]), nf4.quantize(weight, dtype))
    lora = LoraOptions(lora_r=sides.LORA_R, lora_alpha=sides.LORA_ALPHA, lora_dropout=dropout)
    return DualLossModel(add_lora(higgs, lora, "", dtype)).train()


def layer_operations(precision: str, dropout: float) -> dict[str, Counter[str]]:
    """Return the operations of one decoder layer: of its forward pass and, except for 4 bits, of its backward pass.

    Counted as the difference between a model with three layers and one with two.
    """
    from step_grid import samples

    from higgs_ds.data.collate import collate

    batch = collate(samples({"length": 128, "batch": 2}), sides.stream(), random_base.PAD_ID).tensors(CPU)
    parts = 1 + random_base.NUM_CODEBOOKS

    def calls(num_layers: int, device: torch.device, backward: bool) -> Counter[str]:
        model = small_model(num_layers, precision, dropout)
        return operations(model, batch, parts, device, backward).calls

    forward = {device: calls(3, device, False) - calls(2, device, False) for device in (GPU, CPU)}
    counts = {"forward": forward[GPU]}
    if precision != "nf4":  # on a CPU, bitsandbytes dequantizes with many operations of torch's
        counts["backward"] = calls(3, CPU, True) - calls(2, CPU, True) - forward[CPU]
    return counts


def counts_by_setting() -> dict[str, dict[str, int]]:
    """Return the number of operations of a layer in each pass, by precision and dropout."""
    return {
        f"{precision}, dropout {dropout:g}": {
            passes: calls.total() for passes, calls in layer_operations(precision, dropout).items()
        }
        for precision in ("bf16", "nf4")
        for dropout in (0.0, 0.05)
    }


def main() -> None:
    parser = parser_of(__doc__)
    args = parser.parse_args()
    result = counts_by_setting()
    for name, counts in result.items():
        print(f"{name:<20}", ", ".join(f"{passes} {count}" for passes, count in counts.items()))
    report(args, "operations", result)


if __name__ == "__main__":
    main()
