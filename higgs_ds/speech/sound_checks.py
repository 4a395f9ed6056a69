"""What a measure of sound cannot be taken of: silence, very short clips, values that are not numbers."""

from __future__ import annotations

import torch
import torchaudio

RATE = 16000  # sample rate of the recognizers and the measuring models, in Hz
SHORTEST_S = 0.2
SILENT = 10 ** (-70 / 20)  # RMS of the loudest 10 ms, relative to full scale


def why_not_measurable(waveform: torch.Tensor, sample_rate: int) -> str | None:
    """Return why speech cannot be measured in a mono waveform (num_samples,); None if it can.

    Raises:
        ValueError: the waveform is not mono, or has values that are not finite: these are faults of the caller.
    """
    if waveform.ndim != 1:
        raise ValueError(f"a mono waveform (num_samples,) is needed, but its shape is {tuple(waveform.shape)}")
    if not waveform.isfinite().all():
        raise ValueError("the waveform has values that are NaN or infinite")
    if len(waveform) < SHORTEST_S * sample_rate:
        return f"shorter than {SHORTEST_S} s"
    frame = sample_rate // 100
    level = waveform[: len(waveform) // frame * frame].view(-1, frame).square().mean(dim=1).sqrt()
    return "silence" if level.max() < SILENT else None


def at_16_khz(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Return a waveform (num_samples,) at RATE."""
    return torchaudio.functional.resample(waveform, sample_rate, RATE)
