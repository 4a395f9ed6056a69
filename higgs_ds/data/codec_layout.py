"""Convert the configuration and tensors of the audio codec's original layout (`model.pth`) to transformers' layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import HiggsAudioV2TokenizerConfig

from higgs_ds.common.errors import InputError

_UNIT = ("snake1", "conv1", "snake2", "conv2")  # layers of a residual unit of the acoustic parts, in order
_GAIN, _DIRECTION = ".weight_g", ".weight_v"  # the two tensors of a weight-normalized weight
_REPLACED = {
    "quantizer.vq.layers.": "quantizer.quantizers.",
    "._codebook.": ".codebook.",
    "fc_prior.": "fc.",
    "fc_post1.": "fc1.",
    "fc_post2.": "fc2.",
    ".conv.conv.": ".conv.",
    ".conv1.conv.": ".conv1.",
    ".conv2.conv.": ".conv2.",
}
_TRAINING_ONLY = "semantic_model.masked_spec_embed"
# Names of the tensors whose shapes are the geometry of a codec, in either layout.
_ORIGINAL_NAMES = {
    "codebook": "quantizer.vq.layers.{}._codebook.embed",
    "encoder": f"encoder.block.0{_DIRECTION}",
    "decoder": f"decoder_2.model.0{_DIRECTION}",
    "latent": f"encoder.block.{{}}{_DIRECTION}",
}
_NATIVE_NAMES = {
    "codebook": "quantizer.quantizers.{}.codebook.embed",
    "encoder": "acoustic_encoder.conv1.weight",
    "decoder": "acoustic_decoder.conv1.weight",
    "latent": "acoustic_encoder.conv2.weight",
}
# The values that no tensor shows, of the one codec that was released.
RELEASED = {
    "ratios": [8, 5, 4, 2, 3], "sample_rate": 24000, "target_bandwidths": [0.5, 1, 1.5, 2], "bins": 1024,
    "semantic_heads": 12,
}  # fmt: skip
_NEEDED = ("ratios", "sample_rate", "target_bandwidths", "bins")


def native_codec_config(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str
) -> HiggsAudioV2TokenizerConfig:
    """Return a codec's configuration in transformers' layout; values missing from the original come from the tensors.

    Args:
        tensors: by their names in either layout.

    Raises:
        InputError: starting with `where`; this is not a codec in the original layout.
    """
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise InputError(f"{where}: its config.json has no {', '.join(missing)}")
    ratios, semantic = list(config["ratios"]), "semantic_model"
    names = _NATIVE_NAMES if is_native(tensors) else _ORIGINAL_NAMES
    try:
        convolutions = [
            tensors[f"{semantic}.feature_extractor.conv_layers.{i}.conv.weight"].shape
            for i in range(sum(name.endswith(".conv.weight") and "conv_layers" in name for name in tensors))
        ]
        position = f"{semantic}.encoder.pos_conv_embed.conv"
        directions = (f"{position}.parametrizations.weight.original1", f"{position}{_DIRECTION}")
        width, per_group, kernel = next(tensors[name].shape for name in directions if name in tensors)
        native = HiggsAudioV2TokenizerConfig(
            target_bandwidths=config["target_bandwidths"],
            sample_rate=config["sample_rate"],
            semantic_sample_rate=config.get("semantic_sample_rate") or 16000,
            codebook_size=config["bins"],
            codebook_dim=tensors[names["codebook"].format(0)].shape[1],
            acoustic_model_config={
                "model_type": "dac",
                "encoder_hidden_size": len(tensors[names["encoder"]]),
                "decoder_hidden_size": len(tensors[names["decoder"]]),
                "hidden_size": len(tensors[names["latent"].format(len(ratios) + 2)]),
                "downsampling_ratios": ratios,
                "upsampling_ratios": ratios,
            },
            semantic_model_config={
                "model_type": "hubert",
                "hidden_size": width,
                "intermediate_size": len(
                    tensors[f"{semantic}.encoder.layers.0.feed_forward.intermediate_dense.weight"]
                ),
                "num_attention_heads": config.get("semantic_heads", RELEASED["semantic_heads"]),
                "num_hidden_layers": sum(name.endswith("intermediate_dense.weight") for name in tensors),
                "conv_dim": [shape[0] for shape in convolutions],
                "conv_kernel": [shape[2] for shape in convolutions],
                "num_conv_pos_embeddings": kernel,
                "num_conv_pos_embedding_groups": width // per_group,
                "mask_time_prob": 0.0,
            },
        )
    except (KeyError, StopIteration) as error:
        raise InputError(f"{where}: not an audio codec: missing {error}") from error
    num_codebooks = sum(name.endswith("codebook.embed") for name in tensors)
    if native.num_quantizers != num_codebooks:
        raise InputError(
            f"{where}: contains {num_codebooks} codebooks, but the target_bandwidths of its config.json give "
            f"{native.num_quantizers}"
        )
    return native


def is_native(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a codec's tensors have transformers' names."""
    return _NATIVE_NAMES["codebook"].format(0) in tensors


def native_codec_tensors(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> dict[str, torch.Tensor]:
    """Return a codec's tensors by transformers' names, with the acoustic parts' weight normalization folded in.

    Args:
        tensors: by their names in either layout.
        num_blocks: number of blocks of the encoder, and of the decoder.
    """
    native = {}
    has_native_names = is_native(tensors)
    for name, tensor in tensors.items():
        if name == _TRAINING_ONLY:
            continue
        if name.startswith("semantic_model."):
            renamed = name.replace(_GAIN, ".parametrizations.weight.original0")
            native[renamed.replace(_DIRECTION, ".parametrizations.weight.original1")] = tensor
        elif has_native_names:
            native[name] = tensor
        elif name.endswith(_GAIN):
            direction = tensors[name.removesuffix(_GAIN) + _DIRECTION]
            norm = torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True)
            native[_native_name(name.removesuffix(_GAIN) + ".weight", num_blocks)] = direction * (tensor / norm)
        elif not name.endswith(_DIRECTION):
            native[_native_name(name, num_blocks)] = tensor
    return native


def _native_name(name: str, num_blocks: int) -> str:
    for side, prefix in (("acoustic_encoder", "encoder.block."), ("acoustic_decoder", "decoder_2.model.")):
        if name.startswith(prefix):
            return f"{side}.{_acoustic_name(name.removeprefix(prefix).split('.'), num_blocks, side)}"
    for original, native in _REPLACED.items():
        name = name.replace(original, native)
    return name


def _acoustic_name(parts: list[str], num_blocks: int, side: str) -> str:
    """Name a layer of an acoustic part. The original numbers them: convolution, blocks, activation, convolution."""
    at, leaf = int(parts[0]), parts[-1]
    outside = {0: "conv1", num_blocks + 1: "snake1", num_blocks + 2: "conv2"}
    if at in outside:
        return f"{outside[at]}.{leaf}"
    inner = int(parts[2])
    block_layers = {3: "snake1", 4: "conv1"} if side == "acoustic_encoder" else {0: "snake1", 1: "conv_t1"}
    if inner in block_layers:
        return f"block.{at - 1}.{block_layers[inner]}.{leaf}"
    unit = inner + 1 if side == "acoustic_encoder" else inner - 1
    return f"block.{at - 1}.res_unit{unit}.{_UNIT[int(parts[4])]}.{leaf}"
