"""The audio codec (24 kHz to 8 codebooks at 25 frames/s)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

from higgs_ds.errors import InputError
from higgs_ds.files import sha256_of
from higgs_ds.hub import resolve_folder

CODEC_SUBFOLDER = "audio_tokenizer"  # a model folder may bring its codec along
MODEL_TYPE = "higgs_audio_v2_tokenizer"


class Codec:
    """Encodes and decodes clips as inference does: a clip's codes depend on no other clip."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = HiggsAudioV2TokenizerModel.from_pretrained(folder, use_safetensors=True).to(device).eval()
        self.device = device
        self.sample_rate: int = self.model.config.sample_rate
        self.num_codebooks: int = self.model.config.num_quantizers

    @torch.inference_mode()
    def encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Codes (B, C, F), int64 on the CPU, of mono waveforms (B, num_samples) at the codec's sample rate.

        Waveforms of one batch have one length: padding would change the codes, as the codec normalizes over time.
        """
        return self.model.encode(waveforms.to(self.device)[:, None]).audio_codes.cpu()

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Waveform (num_samples,), float32 on the CPU, of codes (C, F)."""
        return self.model.decode(codes.to(self.device)[None]).audio_values[0, 0].float().cpu()


def find_codec(base_folder: Path, name: str | None) -> Path:
    """The codec's folder: the one named, else the one that the base brings along, else the one that it refers to.

    Raises InputError where none is named, or what is named is no codec.
    """
    processor_config = base_folder / "processor_config.json"
    asked_by = "--codec_ckpt"
    if name is None and (base_folder / CODEC_SUBFOLDER).is_dir():
        name = str(base_folder / CODEC_SUBFOLDER)
    if name is None and processor_config.is_file():
        reference = json.loads(processor_config.read_text(encoding="utf-8")).get("audio_tokenizer") or {}
        name, asked_by = reference.get("audio_tokenizer_name_or_path"), f"{processor_config}: audio codec"
    if not name:
        raise InputError(f"{base_folder}: names no audio codec; give one with --codec_ckpt")
    folder = resolve_folder(name, asked_by)
    config = folder / "config.json"
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    if model_type != MODEL_TYPE:
        raise InputError(f"{asked_by} {folder}: model_type is {model_type!r}; an audio codec has '{MODEL_TYPE}'")
    return folder


@dataclass(frozen=True)
class CodecInfo:
    """A codec without its weights."""

    folder: Path
    config: HiggsAudioV2TokenizerConfig

    @property
    def sample_rate(self) -> int:
        return int(self.config.sample_rate)

    @property
    def hop_length(self) -> int:
        """Samples of a frame, which a clip must have at least."""
        return int(self.config.hop_length)

    def num_frames(self, num_samples: int) -> int:
        """Frames of codes that a clip of so many samples is encoded to.

        The semantic branch decides it: resampling, padding by 160 at both ends, convolutions, every n-th frame.
        """
        semantic = self.config.semantic_model_config
        length = -(-num_samples * self.config.semantic_sample_rate // self.config.sample_rate) + 2 * 160
        for kernel, stride in zip(semantic.conv_kernel, semantic.conv_stride, strict=True):
            length = max(0, (length - kernel) // stride + 1)
        return -(-length // self.config.semantic_downsample_factor)


def read_codec_info(folder: Path) -> CodecInfo:
    """A codec's properties, from its configuration."""
    return CodecInfo(folder, HiggsAudioV2TokenizerConfig.from_pretrained(folder))


def codec_digest(folder: Path) -> str:
    """Identity of a codec: SHA-256 over its configuration and weight files. Codes of one codec are noise to another."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(sha256_of(path) for path in files).encode()).hexdigest()
