"""Mel features, the input of a Whisper tower: computed once per stretch of a clip, stored on disk like the codes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from higgs_ds.common.files import replaced_file, saving
from higgs_ds.data.audio import read_audio
from higgs_ds.model.prompt import Stretch
from higgs_ds.model.sample import AudioClip

if TYPE_CHECKING:
    import torch
    from transformers import WhisperFeatureExtractor

SAMPLE_RATE, HOP_LENGTH = 16000, 160  # of Whisper's features
POSITIONS_PER_S = 50  # of its encoder
MARGIN = 4  # mel frames after a clip that the encoder's convolutions reach into


@dataclass(frozen=True)
class MelFeatures:
    """Features (bins, T) of a stretch, float16. `length` frames belong to the clip; a few of silence may follow."""

    values: torch.Tensor
    length: int

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the tower for this stretch."""
        return num_outputs(self.length)


def num_outputs(mel_frames: int) -> int:
    """Return the tower's number of outputs for `mel_frames`: it halves them twice, first rounding up, then down."""
    return (mel_frames + 1) // 2 // 2


@dataclass(frozen=True)
class MelFeatureStore:
    """Stored features for a tower that encodes stretches of `stretch_s` seconds (`frames_per_stretch` codec frames)."""

    num_mel_bins: int
    stretch_s: int
    frames_per_stretch: int
    folder: Path

    @property
    def identity(self) -> str:
        return f"whisper-{self.num_mel_bins}-{self.stretch_s}"

    def stretches(self, num_frames: int, num_outputs: tuple[int, ...]) -> list[Stretch]:
        """Return a clip's stretches in the prompt (tower outputs, codec frames), or [] if it has no tower outputs."""
        if not num_outputs:
            return []
        bounds = [*range(0, num_frames, self.frames_per_stretch), num_frames]
        frames = [stop - start for start, stop in pairwise(bounds)]
        return [Stretch(outputs, count) for outputs, count in zip(num_outputs, frames, strict=True)]

    def num_outputs(self, num_samples: int, num_frames: int) -> tuple[int, ...]:
        """Return the tower's outputs of each stretch of a clip, given its samples at 16 kHz and its codec frames."""
        return tuple(map(num_outputs, self._lengths(num_samples, num_frames)))

    def _lengths(self, num_samples: int, num_frames: int) -> list[int]:
        """Return the number of mel frames of each stretch."""
        stretch = self.stretch_s * SAMPLE_RATE
        count = -(-num_frames // self.frames_per_stretch)
        return [-(-max(0, min(num_samples - i * stretch, stretch)) // HOP_LENGTH) for i in range(count)]

    def store(self, key: str, clip: AudioClip, num_frames: int) -> None:
        """Compute a clip's features and store them. Raises AudioError, SaveError."""
        import torch
        from safetensors.torch import save_file

        waveform = read_audio(clip, SAMPLE_RATE)
        lengths = self._lengths(len(waveform), num_frames)
        stretch = self.stretch_s * SAMPLE_RATE
        pieces = [waveform[i * stretch : (i + 1) * stretch].numpy() for i, length in enumerate(lengths) if length]
        extracted = _extractor(self.num_mel_bins, self.stretch_s)(
            pieces, sampling_rate=SAMPLE_RATE, return_tensors="pt"
        )
        tensors = {
            str(i): values[:, : -(-(length + MARGIN) // 4) * 4].to(torch.float16).contiguous()
            for i, (values, length) in enumerate(zip(extracted["input_features"], filter(None, lengths), strict=True))
        }
        with saving(self.path(key)), replaced_file(self.path(key)) as temporary:
            save_file(tensors, temporary, {"key": key, "lengths": json.dumps(lengths)})

    def load(self, key: str) -> list[MelFeatures] | None:
        """Return the features of a clip's stretches that give tower outputs, or None if they are not stored."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                lengths = [length for length in _lengths_of(file, key) if length]
                stored = [MelFeatures(file.get_tensor(str(i)), length) for i, length in enumerate(lengths)]
                return [features for features in stored if features.num_outputs]
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def kept_outputs(self, key: str) -> tuple[int, ...] | None:
        """Return the same as `num_outputs` for a clip whose features are stored, or None if they are not."""
        try:
            with safe_open(self.path(key), framework="np") as file:
                return tuple(map(num_outputs, _lengths_of(file, key)))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def drop(self, key: str) -> None:
        """Delete a clip's features, so that they are computed again."""
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / self.identity / key[:2] / f"{key}.safetensors"


def _lengths_of(file: safe_open, key: str) -> list[int]:
    metadata = file.metadata() or {}
    if metadata.get("key") != key:
        raise ValueError("features of another clip")
    return json.loads(metadata["lengths"])


@lru_cache(maxsize=1)  # computing its filters takes a while
def _extractor(num_mel_bins: int, stretch_s: int) -> WhisperFeatureExtractor:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=stretch_s)
