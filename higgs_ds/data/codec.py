"""The audio codec (24 kHz to 8 codebooks at 25 frames/s)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel
from transformers.utils.logging import disable_progress_bar

from higgs_ds.common.errors import InputError
from higgs_ds.data.chunked_codec import in_chunks
from higgs_ds.data.mixed_batch import encode_mixed_batch

disable_progress_bar()  # over the tensors of a model; errors and warnings stay


class Codec:
    """Encodes and decodes clips in float32. A clip's codes do not depend on other clips."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model = HiggsAudioV2TokenizerModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.device = device
        self.sample_rate: int = self.model.config.sample_rate
        self.num_codebooks: int = self.model.config.num_quantizers

    @torch.inference_mode()
    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """Return codes (C, F), int64 on the CPU, of a mono waveform (num_samples,) at the codec's sample rate."""
        with _in_float32(), in_chunks(self.model) if self.device.type == "cpu" else contextlib.nullcontext():
            return self.model.encode(waveform.to(self.device)[None, None]).audio_codes[0].cpu()

    @torch.inference_mode()
    def encode_batch(self, waveforms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the codes (C, F) of each waveform, which may differ in length, as `encode` does."""
        with _in_float32():
            codes = encode_mixed_batch(self.model, [waveform.to(self.device) for waveform in waveforms])
        return [clip.cpu() for clip in codes]

    @torch.inference_mode()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the waveform (num_samples,), float32 on the CPU, of codes (C, F)."""
        with _in_float32():
            return self.model.decode(codes.to(self.device)[None]).audio_values[0, 0].float().cpu()


def _in_float32() -> AbstractContextManager[None]:
    """Within the block, cuDNN computes convolutions in float32: by default it rounds their inputs to TF32's 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


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
