"""The precisions of training: their dtypes, and which of them a device computes in natively."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
BF16, FP16, FP32 = PRECISIONS = ("bf16", "fp16", "fp32")
_DTYPES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
FIRST_WITH_BF16 = (8, 0)  # compute capability; the GPUs before it have tensor cores for fp16 only, or none


def torch_dtype(precision: str) -> torch.dtype:
    """Return the dtype of weights and activations in a precision other than auto."""
    import torch

    return getattr(torch, _DTYPES[precision])


def native_precision(device: torch.device) -> str:
    """Return what --precision auto means on a device: the fastest precision that it has instructions for.

    `torch.cuda.is_bf16_supported` is no answer: it is also true where torch emulates bf16 with float32.
    """
    import torch

    if device.type == "cuda":
        return BF16 if torch.cuda.get_device_capability(device) >= FIRST_WITH_BF16 else FP16
    found = torch.cpu.get_capabilities()
    # avx512_bf16 and amx_bf16 on x86, bf16 on ARM
    return BF16 if any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else FP32
