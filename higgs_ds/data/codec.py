"""The audio codec (24 kHz to 8 codebooks at 25 frames/s)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import sha256_of
from higgs_ds.common.hub import resolve_folder
from higgs_ds.data.codec_layout import is_original_codec

CODEC_SUBFOLDER = "audio_tokenizer"  # of a model folder that contains its codec
ORIGINAL_CODEC = "bosonai/higgs-audio-v2-tokenizer"  # that bases in the original layout were released with
PROCESSOR_CONFIG = "processor_config.json"  # of transformers' processor; names the codec
MODEL_TYPE = "higgs_audio_v2_tokenizer"


class Codec:
    """Encodes and decodes clips in float32, as inference does. A clip's codes do not depend on other clips."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = HiggsAudioV2TokenizerModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.device = device
        self.sample_rate: int = self.model.config.sample_rate
        self.num_codebooks: int = self.model.config.num_quantizers

    @torch.inference_mode()
    def encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Return codes (B, C, F), int64 on the CPU, of mono waveforms (B, num_samples) at the codec's sample rate.

        Waveforms of a batch have the same length: the codec normalizes over time, so padding would change the codes.
        """
        return self.model.encode(waveforms.to(self.device)[:, None]).audio_codes.cpu()

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the waveform (num_samples,), float32 on the CPU, of codes (C, F)."""
        return self.model.decode(codes.to(self.device)[None]).audio_values[0, 0].float().cpu()


def find_codec(base_folder: Path, name: str | None) -> Path:
    """Return the codec's folder: the named one, else the one inside the base's folder, else the one the base refers to.

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
    folder = resolve_folder(name, asked_by)
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
    """A codec's properties, without its weights."""

    folder: Path
    config: HiggsAudioV2TokenizerConfig

    @property
    def sample_rate(self) -> int:
        return int(self.config.sample_rate)

    @property
    def hop_length(self) -> int:
        """Number of samples per frame, which is also the minimum length of a clip."""
        return int(self.config.hop_length)

    def num_frames(self, num_samples: int) -> int:
        """Return the number of code frames of a clip of `num_samples` samples.

        The semantic branch determines it: resampling, padding by 160 at both ends, convolutions, every n-th frame.
        """
        semantic = self.config.semantic_model_config
        length = -(-num_samples * self.config.semantic_sample_rate // self.config.sample_rate) + 2 * 160
        for kernel, stride in zip(semantic.conv_kernel, semantic.conv_stride, strict=True):
            length = max(0, (length - kernel) // stride + 1)
        return -(-length // self.config.semantic_downsample_factor)


def read_codec_info(folder: Path) -> CodecInfo:
    """Read a codec's properties from its configuration."""
    return CodecInfo(folder, HiggsAudioV2TokenizerConfig.from_pretrained(folder))


def codec_digest(folder: Path) -> str:
    """Return a codec's identity, as codes of one codec are noise to another: SHA-256 of its config and weight files."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()


def check_codec_tensors(where: str, config: HiggsAudioV2TokenizerConfig, found: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError, starting with `where`, unless `found` are the tensors of a codec with this configuration."""
    with torch.device("meta"):
        expected = HiggsAudioV2TokenizerModel(config).state_dict()
    differing = [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    problems = {
        "missing tensors:": expected.keys() - found.keys(),
        "unknown tensors:": found.keys() - expected.keys(),
        "tensors of a wrong shape:": differing,
    }
    if any(problems.values()):
        raise InputError(
            [f"{where}: {what} {', '.join(sorted(names)[:3])}" for what, names in problems.items() if names]
        )
