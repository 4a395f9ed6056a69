"""The distance between the spectra of two waveforms, at several resolutions."""

from __future__ import annotations

import torch
import torchaudio
from torch import nn

FFT_SIZES = (256, 512, 1024, 2048)
FLOOR = 1e-4  # of magnitudes, for waveforms with peaks below 1
NUM_MELS = 80


class SpectralLoss(nn.Module):
    """Log-magnitude distance and spectral convergence (arXiv:1910.11480), and the distance of log-mel spectra."""

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(
            torchaudio.transforms.Spectrogram(size, hop_length=size // 4, power=1) for size in FFT_SIZES
        )
        self.to_mel = torchaudio.transforms.MelScale(NUM_MELS, sample_rate, n_stft=1024 // 2 + 1)

    def forward(self, waveforms: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the distance of two batches of waveforms (B, num_samples), a scalar."""
        total = torch.zeros(())
        for size, spectrum in zip(FFT_SIZES, self.spectra, strict=True):
            found, wanted = spectrum(waveforms), spectrum(target)
            total = total + _log_distance(found, wanted) + (found - wanted).norm() / wanted.norm().clamp(min=FLOOR)
            if size == 1024:
                total = total + len(FFT_SIZES) * _log_distance(self.to_mel(found), self.to_mel(wanted))
        return total / len(FFT_SIZES)


def _log_distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (found.clamp(min=FLOOR).log() - wanted.clamp(min=FLOOR).log()).abs().mean()
