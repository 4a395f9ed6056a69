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
SPEECH_BAND_HZ = {"f_min": 80, "f_max": 4000}  # words are in it; recordings at 8 kHz have nothing above it
MEL_RANGE_DB = 50  # below the loudest band, under which differences are inaudible
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


def spoken_seconds(waveform: torch.Tensor, sample_rate: int) -> float:
    """Return the time from the first to the last loud 10 ms of a waveform (num_samples,); 0 for silence."""
    frame = int(FRAME_S * sample_rate)
    level = waveform[: len(waveform) // frame * frame].view(-1, frame).square().mean(dim=1)
    if not len(level) or level.max() <= 0:
        return 0.0
    loud = (10 * (level / level.max()).clamp(min=1e-12).log10() > AUDIBLE_DB).nonzero()
    return float(loud[-1] - loud[0] + 1) * FRAME_S


def mel_distance_db(spoken: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Return the mean difference of two waveforms' mel spectra, in dB; `spoken` is stretched in time to the target."""
    to_mel = torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=1024, hop_length=256, n_mels=NUM_MELS, power=1)
    spoken_mel, target_mel = (20 * to_mel(waveform).clamp(min=FLOOR).log10() for waveform in (spoken, target))
    stretched = torch.nn.functional.interpolate(
        spoken_mel[None], size=target_mel.shape[1], mode="linear", align_corners=False
    )[0]
    return float((stretched - target_mel).abs().mean())


def spectral_similarity(spoken: torch.Tensor, target: torch.Tensor, sample_rate: int) -> float:
    """Return how alike two waveforms' mel spectra change in time and frequency: 1 if the same, about 0 if unrelated.

    This is the correlation of log mel spectra from 80 to 4,000 Hz in the target's loud frames. Each frame's and each
    band's mean is subtracted first, so that neither loudness nor a filter changes it. The waveforms, (num_samples,),
    have to begin at the same time. 0 if one of them does not change.
    """
    to_mel = torchaudio.transforms.MelSpectrogram(sample_rate, n_fft=1024, hop_length=256, n_mels=40, **SPEECH_BAND_HZ)
    shared = min(len(spoken), len(target))
    spoken_mel, target_mel = (10 * to_mel(w[:shared]).clamp(min=1e-12).log10() for w in (spoken, target))
    loudest = target_mel.amax(dim=0)
    loud = loudest > loudest.max() + AUDIBLE_DB
    changes = []
    for mel in (spoken_mel, target_mel):
        mel = mel.clamp(min=mel.max() - MEL_RANGE_DB)[:, loud]
        changes.append(mel - mel.mean(dim=0) - mel.mean(dim=1, keepdim=True) + mel.mean())
    correlation = torch.corrcoef(torch.stack([change.flatten() for change in changes]))[0, 1]
    return float(correlation.nan_to_num(0.0))


def stop_warning(stop_rate: float) -> str | None:
    """Return a warning if no generated sample has stopped on its own."""
    if stop_rate > 0:
        return None
    return (
        "warning: stop rate 0 is bad: no sample stopped on its own, each was cut off. A model that has learned to "
        "speak ends its speech itself: train longer, or on recordings that the base's codec can code"
    )


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case, without punctuation and inline tags (`<|style:whisper|>`)."""
    return re.findall(r"[\w']+", re.sub(r"<\|[^|]*\|>", " ", text.lower()))


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Return the smallest number of inserted, missing and wrong words that explains what was heard."""
    return int(torchaudio.functional.edit_distance(list(said), list(heard)))
