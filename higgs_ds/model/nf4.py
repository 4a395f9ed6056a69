"""A 4-bit base: NF4 with double quantization (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Only the decoder's linear layers are quantized. The heads and the embeddings are not, because the loss and the codes
are computed from them directly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from higgs_ds.model.quantization import BLOCK_SIZE, QUANT_TYPE, BaseQuantization, is_quantized_weight


def quantize(weight: torch.Tensor, compute_dtype: torch.dtype) -> Params4bit:
    """Quantize a weight (out, in) on its device. Forward and backward passes dequantize it to `compute_dtype`."""
    packed, state = quantize_4bit(
        weight.to(compute_dtype).contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type=QUANT_TYPE,
        quant_storage=torch.uint8,
    )
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type=QUANT_TYPE,
        quant_storage=torch.uint8,
        bnb_quantized=True,
    )


class NF4Linear(Linear4bit):
    """A 4-bit layer that reads its weight from the module again in the backward pass.

    bitsandbytes' own layer keeps a reference to the weight of the forward pass. Under ZeRO-3 this is the gathered
    weight, so that after a forward pass each rank would hold all weights.
    """

    def forward(self, x: torch.Tensor, function: Callable[[torch.Tensor], Any] | None = None) -> Any:
        """Return the layer's outputs, or `function(x)` (see `model.gathering`)."""
        if function is not None:
            return function(x)
        y = _FourBitMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self) -> torch.Tensor:
        """Return the weight (out, in) that the layer computes with."""
        return dequantize(cast(Params4bit, self.weight))


class _FourBitMatmul(torch.autograd.Function):
    """x W^T, for x (..., in) and a frozen 4-bit weight W (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: NF4Linear) -> torch.Tensor:
        ctx.layer = layer
        assert layer.quant_state is not None  # set by `fill`
        return matmul_4bit(x, layer.weight, quant_state=layer.quant_state)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ dequantize(ctx.layer.weight).to(gradients[0].dtype), None


def replace_linears(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Replace each linear layer of the decoder by an empty 4-bit layer. `fill` sets their weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized_weight(f"{name}.weight"):
            layer = NF4Linear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=compute_dtype,
                quant_type=QUANT_TYPE,
                device="meta",
            )
            model.set_submodule(name, layer)
    setattr(model, "is_loaded_in_4bit", True)  # noqa: B010 - read by PEFT; the class does not declare it


def fill(layer: NF4Linear, weight: Params4bit) -> None:
    """Set the weight of a layer from `replace_linears`."""
    layer.weight = weight
    layer.quant_state = weight.quant_state
    weight.module = layer


def dequantize(weight: Params4bit) -> torch.Tensor:
    """Dequantize a weight (out, in) as the forward pass does, to the compute dtype that it was quantized for."""
    return dequantize_4bit(weight.data, weight.quant_state)


def digest(weight: Params4bit) -> str:
    """Return 64 bits, in hexadecimal, of the SHA-256 of all inputs of `dequantize`."""
    state: QuantState = weight.quant_state
    hashed = hashlib.sha256()
    for part in (weight.data, state.absmax, state.state2.absmax, state.offset):
        hashed.update(part.contiguous().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def describe(weights: dict[str, Params4bit], compute_dtype: torch.dtype) -> BaseQuantization:
    """Return the record of a quantized base. Call it before the weights are moved or partitioned."""
    device = next(iter(weights.values())).device
    return BaseQuantization(
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        bitsandbytes=version("bitsandbytes"),
        device=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        digests={name: digest(weight) for name, weight in weights.items()},
    )


def move_statistics(model: nn.Module, device: torch.device) -> None:
    """Move the scales of quantized weights to a device. They are not parameters, so nothing else moves them."""
    for module in model.modules():
        if isinstance(module, NF4Linear) and module.quant_state is not None:
            module.quant_state.to(device)
