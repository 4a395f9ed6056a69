"""Find an audio codec, and read its properties without its weights or transformers, whose import takes seconds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.common.hub import resolve_folder

CODEC_SUBFOLDER = "audio_tokenizer"  # of a model folder that contains its codec
ORIGINAL_CODEC = "bosonai/higgs-audio-v2-tokenizer"  # that bases in the original layout were released with
PROCESSOR_CONFIG = "processor_config.json"  # of transformers' processor; names the codec
MODEL_TYPE = "higgs_audio_v2_tokenizer"
SEMANTIC_PADDING = 160  # samples that the codec adds at both ends for its semantic branch


def is_original_codec(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of a codec in the original layout, which has no model type."""
    return "model_type" not in config and "semantic_techer" in config


def find_codec(base_folder: Path, name: str | None, resolve: Callable[[str, str], Path] = resolve_folder) -> Path:
    """Return the codec's folder: the named one, else the one inside the base's folder, else the one the base refers to.

    Args:
        resolve: finds a folder or a hub id, with everything that is needed of it.

    Raises:
        InputError: no codec is named, or the named folder is not a codec.
    """
    processor_config = base_folder / PROCESSOR_CONFIG
    asked_by = "--codec_ckpt"
    if name is None and (base_folder / CODEC_SUBFOLDER).is_dir():
        name = str(base_folder / CODEC_SUBFOLDER)
    if name is None and processor_config.is_file():
        reference = json.loads(processor_config.read_text(encoding="utf-8")).get("audio_tokenizer") or {}
        name, asked_by = reference.get("audio_tokenizer_name_or_path"), f"{processor_config}: audio codec"
    if not name:
        raise InputError(f"{base_folder}: names no audio codec; give one with --codec_ckpt")
    folder = resolve(name, asked_by)
    config = read_codec_json(folder)
    if config.get("model_type") != MODEL_TYPE and not is_original_codec(config):
        raise InputError(
            f"{asked_by} {folder}: model_type is {config.get('model_type')!r}; an audio codec has '{MODEL_TYPE}', or "
            "is in the original layout, with model.pth"
        )
    return folder


def read_codec_json(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder, or {} if it has none."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class CodecInfo:
    """A codec's properties, without its weights. Rates are in Hz.

    hop_length: number of samples per frame, which is also the minimum length of a clip.
    semantic_convolutions: kernel and stride of each convolution of the semantic branch.
    semantic_hop: number of outputs of these convolutions per frame.
    """

    folder: Path
    sample_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int
    semantic_sample_rate: int
    semantic_convolutions: tuple[tuple[int, int], ...]
    semantic_hop: int

    def num_frames(self, num_samples: int) -> int:
        """Return the number of code frames of a clip of `num_samples` samples.

        The semantic branch determines it: resampling, padding at both ends, convolutions, every n-th frame.
        """
        length = -(-num_samples * self.semantic_sample_rate // self.sample_rate) + 2 * SEMANTIC_PADDING
        for kernel, stride in self.semantic_convolutions:
            length = max(0, (length - kernel) // stride + 1)
        return -(-length // self.semantic_hop)


# Defaults of transformers' HiggsAudioV2TokenizerConfig and of the two configurations inside it.
_DEFAULTS: dict[str, Any] = {
    "target_bandwidths": [0.5, 1, 1.5, 2, 4], "sample_rate": 24000, "semantic_sample_rate": 16000,
    "codebook_size": 1024, "downsample_factor": 320,
}  # fmt: skip
_ACOUSTIC_DEFAULTS: dict[str, Any] = {"downsampling_ratios": [8, 5, 4, 2]}
_SEMANTIC_DEFAULTS: dict[str, Any] = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}


def read_codec_info(folder: Path) -> CodecInfo:
    """Read a codec's properties from its configuration, as transformers derives them.

    Raises:
        InputError: a value has the wrong type.
    """
    config = _DEFAULTS | read_codec_json(folder)
    acoustic = _ACOUSTIC_DEFAULTS | (config.get("acoustic_model_config") or {})
    semantic = _SEMANTIC_DEFAULTS | (config.get("semantic_model_config") or {})
    rate, semantic_rate, size = config["sample_rate"], config["semantic_sample_rate"], config["codebook_size"]
    try:
        hop = math.prod(acoustic["downsampling_ratios"])
        bits_per_s = math.ceil(rate / hop) * math.ceil(math.log2(size))
        return CodecInfo(
            folder=folder,
            sample_rate=rate,
            hop_length=hop,
            num_codebooks=int(1000 * config["target_bandwidths"][-1] // bits_per_s),
            codebook_size=size,
            semantic_sample_rate=semantic_rate,
            semantic_convolutions=tuple(zip(semantic["conv_kernel"], semantic["conv_stride"], strict=True)),
            semantic_hop=int(hop / (rate / semantic_rate) / config["downsample_factor"]),
        )
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"{folder / 'config.json'}: is not the configuration of an audio codec: {error}") from error


def codec_digest(folder: Path) -> str:
    """Return a codec's identity, as codes of one codec are noise to another: SHA-256 of its config and weight files."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()
