"""Read audio files as the codec needs them: mono float32 at its sample rate. Write audio files."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio

from higgs_ds.common.files import replaced_file
from higgs_ds.data.sample import AudioClip

# torchaudio's defaults, written out because they are part of the keys of the code cache.
RESAMPLING: dict[str, Any] = {"lowpass_filter_width": 6, "rolloff": 0.99, "resampling_method": "sinc_interp_hann"}
SILENCE_PEAK = 1e-3  # -60 dBFS: a quieter clip is inaudible
FULL_SCALE = 0.999
WRITTEN_AS = (".wav", ".flac")
MAX_STRETCH_S = 1e6  # longer than any file: keeps the number of samples finite
TOLERANCE_S = 0.1  # by which a clip may extend past the end of its file: durations in manifests are rounded


class AudioError(ValueError):
    """An audio file that cannot be used. The text gives the reason, without the file's name."""


@dataclass(frozen=True)
class AudioFacts:
    """Properties of a clip that are known once it is decoded."""

    source_samples: int
    source_rate: int
    clipped: float  # fraction of the samples at full scale

    def num_samples(self, sample_rate: int) -> int:
        """Return the number of samples after torchaudio's resampling."""
        return -(-self.source_samples * sample_rate // self.source_rate)


def examine(clip: AudioClip, max_s: float) -> AudioFacts:
    """Decode a clip, without resampling it, and check that it can be trained on.

    Raises:
        AudioError: as in `read_audio`; or the clip lasts longer than `max_s` seconds, or is silent.
    """
    waveform, source_rate = _decode(clip)
    seconds = len(waveform) / source_rate
    if seconds > max_s:
        raise AudioError(f"lasts {seconds:.1f} s, longer than --max_clip_s {max_s:g}; cut it with offset and duration")
    magnitude = np.abs(waveform)
    peak = magnitude.max()
    if peak < SILENCE_PEAK:
        raise AudioError(f"is silent: its peak is {20 * math.log10(peak) if peak else -math.inf:.0f} dBFS")
    return AudioFacts(len(waveform), source_rate, float((magnitude >= FULL_SCALE).mean()))


def read_audio(clip: AudioClip, sample_rate: int) -> torch.Tensor:
    """Decode a clip (wav, flac, mp3, ogg), mix it down to mono and resample it.

    Returns:
        float32 tensor of shape (num_samples,) at `sample_rate` Hz.

    Raises:
        AudioError: the file is missing, cannot be decoded, or ends before the clip does; or the clip contains no
            samples, or NaN or infinite ones.
    """
    waveform, source_rate = _decode(clip)
    mono = torch.from_numpy(waveform).mean(dim=1)
    return torchaudio.functional.resample(mono, source_rate, sample_rate, **RESAMPLING)


def _decode(clip: AudioClip) -> tuple[np.ndarray, int]:
    """Return a clip's samples, float32 (num_samples, channels), and their rate."""
    if clip.data is None and not clip.path.is_file():
        raise AudioError("no such file" if not clip.path.exists() else "is not a file")
    try:
        with contextlib.ExitStack() as stack:
            # By file descriptor: given a name that ends in .raw, libsndfile expects samples without a header.
            source = stack.enter_context(clip.path.open("rb")).fileno() if clip.data is None else io.BytesIO(clip.data)
            file = stack.enter_context(soundfile.SoundFile(source, closefd=False))
            rate = file.samplerate
            start = round(min(clip.offset_s, file.frames / rate) * rate)
            count = -1 if clip.duration_s is None else round(min(clip.duration_s, MAX_STRETCH_S) * rate)
            file.seek(start)
            waveform = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise AudioError(f"cannot be read as audio: {reason}") from error
    if len(waveform) == 0:
        raise AudioError(f"contains no samples after {clip.offset_s:g} s" if clip.offset_s else "contains no samples")
    if len(waveform) < count - TOLERANCE_S * rate:
        raise AudioError(
            f"ends at {(start + len(waveform)) / rate:.2f} s, "
            f"before the end of the clip (offset {clip.offset_s:g} s, duration {clip.duration_s:g} s)"
        )
    if not np.isfinite(waveform).all():
        raise AudioError("contains NaN or infinite samples")
    return waveform, rate


def as_ogg(path: Path) -> bytes:
    """Return an audio file as Ogg Vorbis, a tenth of its size as WAV."""
    waveform, sample_rate = soundfile.read(path, dtype="float32")
    content = io.BytesIO()
    soundfile.write(content, waveform, sample_rate, format="OGG", subtype="VORBIS")
    return content.getvalue()


def write_audio(path: Path, waveform: torch.Tensor, sample_rate: int) -> None:
    """Write a mono waveform (num_samples,) as 16-bit PCM, to WAV or FLAC depending on the file suffix."""
    content = io.BytesIO()
    soundfile.write(content, waveform.clamp(-1, 1).numpy(), sample_rate, "PCM_16", format=path.suffix[1:])
    with replaced_file(path) as temporary:
        temporary.write_bytes(content.getvalue())
