"""Clips of one loudness: integrated loudness by ITU-R BS.1770, measured by pyloudnorm."""

from __future__ import annotations

import torch

PEAK = 10 ** (-0.1 / 20)  # -0.1 dBFS: a clip is made louder up to there


def set_loudness(waveform: torch.Tensor, sample_rate: int, loudness: float) -> tuple[torch.Tensor, bool]:
    """Scale a clip (num_samples,) of at least 0.4 s to a loudness in LUFS.

    Returns:
        the clip, and whether it has that loudness: a clip whose peaks would be clipped stays quieter.
    """
    import pyloudnorm

    measured = pyloudnorm.Meter(sample_rate).integrated_loudness(waveform.double().numpy())
    gain = 10 ** ((loudness - measured) / 20)
    highest = PEAK / max(float(waveform.abs().max()), 1e-9)
    return waveform * min(gain, highest), gain <= highest
