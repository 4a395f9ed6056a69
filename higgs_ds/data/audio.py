"""Audio files as the codec takes them: mono float32 at its sample rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio

from higgs_ds.data.sample import AudioClip

# torchaudio's defaults, spelled out because the cache of codes is keyed by them.
RESAMPLING: dict[str, Any] = {"lowpass_filter_width": 6, "rolloff": 0.99, "resampling_method": "sinc_interp_hann"}


class AudioError(ValueError):
    """An audio file that cannot be used; the text says why, without the file's name."""


def read_audio(clip: AudioClip, sample_rate: int) -> torch.Tensor:
    """Decode a clip (wav, flac, mp3, ogg), mix it down to mono and resample it.

    Returns float32 of shape (num_samples,) at `sample_rate` Hz.
    Raises AudioError: the file is missing, cannot be decoded, or holds no samples or not-a-number in the stretch.
    """
    waveform, source_rate = _decode(clip)
    if waveform.shape[0] == 0:
        raise AudioError(f"holds no samples from {clip.offset_s} s on")
    if not np.isfinite(waveform).all():
        raise AudioError("holds NaN or infinite samples")
    mono = torch.from_numpy(waveform).mean(dim=1)
    return torchaudio.functional.resample(mono, source_rate, sample_rate, **RESAMPLING)


def _decode(clip: AudioClip) -> tuple[np.ndarray, int]:
    """Float32 samples (num_samples, channels) and their rate."""
    if not clip.path.is_file():
        raise AudioError("no such file" if not clip.path.exists() else "is not a file")
    try:
        with soundfile.SoundFile(clip.path) as file:
            start = min(round(clip.offset_s * file.samplerate), file.frames)
            count = -1 if clip.duration_s is None else round(clip.duration_s * file.samplerate)
            file.seek(start)
            return file.read(count, dtype="float32", always_2d=True), file.samplerate
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(f"cannot be read as audio: {error}") from error


def write_audio(path: Path, waveform: torch.Tensor, sample_rate: int) -> None:
    """Write a mono waveform (num_samples,) as 16-bit PCM, in the format that the file's name asks for."""
    soundfile.write(path, waveform.clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16")
