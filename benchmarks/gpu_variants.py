"""Variants of single operations at the model's shapes: which chunk sizes, kernels and optimizers are fastest."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import random_base
import sides
import torch
import torch.nn.functional as F
from gpu_rows import Output, timed
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CHUNK_BITS = (20, 21, 22, 23, 24, 25)  # logits in memory at the same time, as powers of two
REPEATS = 5
Work = Callable[[], Any]


def measure(out: Output, values: dict[str, Any], length: int, device: torch.device) -> None:
    """Time every variant forward and backward; one that the device or the software lacks is a row that says so."""
    for group in (_head_loss, _dequantization, _attention, _optimizers, _elementwise, _compiled):
        for name, make in group(values, length, device):
            if not out.has(4 if device.type == "cuda" else 0.5, f"{group.__name__[1:]} {name}"):
                continue
            row = {"variant": group.__name__[1:], "of": name}
            try:
                seconds = timed(make(), REPEATS, warmup=2)
            except (RuntimeError, ImportError) as error:  # torch's errors for kernels that a device lacks
                out.row(**row, unavailable=str(error).splitlines()[0][:120])
                continue
            out.row(**row, ms=1000 * statistics.median(seconds))


def _random(*shape: int, device: torch.device, grad: bool = False) -> torch.Tensor:
    return (0.1 * torch.randn(shape, device=device)).bfloat16().requires_grad_(grad)


def _head_loss(values: dict[str, Any], length: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Work]]]:
    """The loss of the audio head for all positions, with chunks of several sizes."""
    from higgs_ds.model import head_loss

    parts, classes = random_base.NUM_CODEBOOKS, random_base.CODEBOOK_SIZE

    def make(logits: int) -> Work:
        hidden = _random(length, values["hidden_size"], device=device, grad=True)
        head = _random(parts * classes, values["hidden_size"], device=device)
        targets = torch.randint(classes, (length, parts), device=device)
        weights = torch.full((parts,), 1 / length, device=device)

        def work() -> None:
            chunks = head_loss.Chunks(logits, head_loss.GPU_CHUNKS.classes, logits)
            head_loss.head_loss(hidden, head, targets, weights, chunks)[0].sum().backward()

        return work

    for bits in CHUNK_BITS:
        note = ", the default" if 2**bits == head_loss.GPU_CHUNKS.logits else ""
        yield f"2**{bits} logits at once{note}", lambda bits=bits: make(2**bits)  # type: ignore[misc]


def _dequantization(
    values: dict[str, Any], length: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], Work]]]:
    """One weight of the FFN: dequantized from NF4, and multiplied with."""
    from higgs_ds.model import nf4

    weight = _random(values["intermediate_size"], values["hidden_size"], device=device)
    x = _random(length, values["hidden_size"], device=device)
    packed = nf4.quantize(weight, torch.bfloat16)
    yield "dequantize one weight of the FFN", lambda: lambda: nf4.dequantize(packed)
    yield "multiply with it", lambda: lambda: x @ weight.t()


def _attention(values: dict[str, Any], length: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Work]]]:
    heads, kv, dim = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]

    def make(backend: SDPBackend) -> Work:
        query, key, value = (_random(1, n, length, dim, device=device, grad=True) for n in (heads, kv, kv))

        def work() -> None:
            with sdpa_kernel([backend]):
                F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).sum().backward()

        return work

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    for backend in kinds:
        yield backend.name.lower(), lambda backend=backend: make(backend)  # type: ignore[misc]


def _optimizers(values: dict[str, Any], length: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Work]]]:
    """A step of AdamW on the adapters, and on the one flat tensor that ZeRO-1 and 2 keep."""
    hidden, ffn, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]

    def make(flat: bool, **kind: bool) -> Work:
        pairs = [(hidden, hidden)] * 4 + [(hidden, ffn)] * 6
        shapes = [(sides.LORA_R, width) for pair in pairs for width in pair] * layers
        if flat:
            shapes = [(1, sum(rows * columns for rows, columns in shapes))]
        parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        return torch.optim.AdamW(parameters, **kind).step  # type: ignore[arg-type]

    for flat in (False, True):
        for kind in ("fused", "foreach"):
            name = f"AdamW, {kind}, {'one flat tensor' if flat else 'adapters'}"
            yield name, lambda flat=flat, kind=kind: make(flat, **{kind: True})  # type: ignore[misc]


def _layer_parts(values: dict[str, Any], device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return an FFN and a norm as training uses them, frozen."""
    from transformers import HiggsAudioV2Config
    from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2MLP, HiggsAudioV2RMSNorm

    from higgs_ds.model.v2.routed_layers import LeanMLP, LeanNorm

    config = HiggsAudioV2Config.from_dict(values | random_base.FIXED)
    ffn, norm = HiggsAudioV2MLP(config), HiggsAudioV2RMSNorm(config.hidden_size)
    ffn.__class__, norm.__class__ = LeanMLP, LeanNorm
    return tuple(part.to(device, torch.bfloat16).requires_grad_(False) for part in (ffn, norm))  # type: ignore[return-value]


def _there_and_back(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Work:
    return lambda: function(*inputs).sum().backward()


def _elementwise(values: dict[str, Any], length: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Work]]]:
    """The norm, and the activation with its gate: here, and in liger-kernel if it is installed."""
    from higgs_ds.model.lean_ops import GatedActivation

    ffn, norm = _layer_parts(values, device)
    x = _random(length, values["hidden_size"], device=device, grad=True)
    gate, up = (_random(length, values["intermediate_size"], device=device, grad=True) for _ in range(2))
    yield "norm, here", lambda: _there_and_back(norm, x)
    yield "SwiGLU, here", lambda: _there_and_back(partial(GatedActivation.apply, ffn.act_fn), gate, up)
    if importlib.util.find_spec("liger_kernel") is None:
        return

    def liger_norm() -> Work:
        from liger_kernel.transformers.functional import liger_rms_norm

        return _there_and_back(lambda x: liger_rms_norm(x, norm.weight, norm.variance_epsilon), x)

    def liger_swiglu() -> Work:
        from liger_kernel.transformers.functional import liger_swiglu

        return _there_and_back(liger_swiglu, gate, up)

    yield "norm, liger-kernel", liger_norm
    yield "SwiGLU, liger-kernel", liger_swiglu


def _compiled(values: dict[str, Any], length: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Work]]]:
    """An FFN with its norm, compiled or not. Compiling is not timed."""
    ffn, norm = _layer_parts(values, device)
    x = _random(length, values["hidden_size"], device=device, grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + ffn(norm(x))

    def compiled() -> Work:
        import torch._dynamo

        torch._dynamo.config.disable = False  # the trainer turns it off, because importing it takes seconds
        return _there_and_back(torch.compile(layer), x)

    yield "FFN, as it is", lambda: _there_and_back(layer, x)
    if device.type == "cuda":  # on a CPU, a C++ compiler would be needed
        yield "FFN, compiled", compiled
