"""Bases with random weights: written to files, or made on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NUM_CODEBOOKS, CODEBOOK_SIZE, PAD_ID = 8, 1026, 1
AUDIO_BOS, AUDIO_DELAY, AUDIO, AUDIO_EOS, TURN_END = 13, 14, 16, 12, 9  # any ids work
FIXED = {
    "num_codebooks": NUM_CODEBOOKS, "codebook_size": CODEBOOK_SIZE, "audio_token_id": AUDIO,
    "audio_delay_token_id": AUDIO_DELAY, "audio_bos_token_id": AUDIO_BOS, "pad_token_id": PAD_ID,
}  # fmt: skip


def write_base(folder: Path, values: dict[str, Any], precision: str, shard_bytes: int = 2**30) -> dict[str, Any]:
    """Write a native base with random weights, one shard at a time, drawn on the GPU if there is one.

    `values` may be a complete config.json. Returns the size of the base in GiB and the number of its files.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    config = HiggsAudioV2Config.from_dict(values | FIXED)
    dtype = torch_dtype(precision)
    with init_empty_weights():
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    config.architectures, config.dtype = [type(model).__name__], dtype
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and dtype.itemsize * sum(shapes[n].numel() for n in [*shards[-1], name]) > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    draw = torch.Generator(device).manual_seed(0)

    def weight(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=draw).cpu()

    files = {f"model-{i + 1:05d}.safetensors": names for i, names in enumerate(shards)}
    for file, names in files.items():
        save_file({name: weight(shapes[name]) for name in names}, folder / file, {"format": "pt"})
    places = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    total_bytes = dtype.itemsize * sum(shape.numel() for shape in shapes.values())
    return {"base_gib": total_bytes / 2**30, "shards": len(shards)}


def random_model(values: dict[str, Any], precision: str, four_bit: bool, device: Any) -> Any:
    """Return a frozen base with random weights, each drawn on its device; `values` as for `write_base`."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

    from higgs_ds.model import nf4
    from higgs_ds.model.quantization import is_quantized_weight

    dtype, draw = torch_dtype(precision), torch.Generator(device).manual_seed(0)
    config = HiggsAudioV2Config.from_dict(values | FIXED)
    config.dtype = dtype
    with init_empty_weights():
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if four_bit:
        nf4.replace_linears(model, dtype)
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        weight = torch.ones(shape, dtype=dtype, device=device)
        if len(shape) > 1:
            weight.normal_(std=0.02, generator=draw)
        if four_bit and is_quantized_weight(name):
            nf4.fill(model.get_submodule(layer), nf4.quantize(weight, dtype))
        else:
            setattr(model.get_submodule(layer), leaf, nn.Parameter(weight))
    return model.requires_grad_(False).to(device)  # moves the buffers


def torch_dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
