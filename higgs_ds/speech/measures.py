"""Measures of how far generated speech is from its reference: codes, length, pitch, spectrum, words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torchaudio

LOWEST_HZ, HIGHEST_HZ = 60, 500  # pitch of voices
AUDIBLE_DB = -30.0  # relative to the loudest frame; below this, the pitch of a frame cannot be measured
FRAME_S = 0.01
NUM_MELS = 80
FLOOR = 1e-4  # magnitude of a mel band below which it counts as silence


def agreement(spoken: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the share of frames in which each codebook has the reference's code, float32 (C,).

    The codes are (C, F) and (C, F'). A frame that only one of them has counts as different.
    """
    shared = min(spoken.shape[1], target.shape[1])
    same = (spoken[:, :shared] == target[:, :shared]).sum(dim=1)
    return same / max(spoken.shape[1], target.shape[1])


def median_pitch_hz(waveform: torch.Tensor, sample_rate: int) -> float:
    """Return the median fundamental frequency of the loud frames of a waveform (num_samples,); NaN if too few.

    Uses torchaudio's normalized cross-correlation with a median filter.
    """
    frame = int(FRAME_S * sample_rate)
    if len(waveform) < 40 * frame:
        return float("nan")
    pitch = torchaudio.functional.detect_pitch_frequency(
        waveform[None], sample_rate, frame_time=FRAME_S, freq_low=LOWEST_HZ, freq_high=HIGHEST_HZ
    )[0]
    level = waveform[: len(waveform) // frame * frame].view(-1, frame).square().mean(dim=1)[: len(pitch)]
    loud = 10 * (level / level.max().clamp(min=1e-12)).clamp(min=1e-12).log10() > AUDIBLE_DB
    return float(pitch[: len(level)][loud].median()) if level.max() > 0 else float("nan")


def mel_distance_db(spoken: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Return the mean difference of two waveforms' mel spectra, in dB; `spoken` is stretched in time to the target."""
    to_mel = torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=1024, hop_length=256, n_mels=NUM_MELS, power=1)
    spoken_mel, target_mel = (20 * to_mel(waveform).clamp(min=FLOOR).log10() for waveform in (spoken, target))
    stretched = torch.nn.functional.interpolate(
        spoken_mel[None], size=target_mel.shape[1], mode="linear", align_corners=False
    )[0]
    return float((stretched - target_mel).abs().mean())


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Return the smallest number of inserted, missing and wrong words that explains what was heard."""
    return int(torchaudio.functional.edit_distance(list(said), list(heard)))
