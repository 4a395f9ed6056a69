"""DNSMOS: how listeners would rate a clip's sound, from 1 to 5, as estimated by Microsoft's networks.

Reddy et al. 2022 (P.835: the voice, the background, and both; arXiv 2110.01763) and 2021 (P.808: overall; arXiv
2010.15258), with the weights that the package speechmos contains.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from higgs_ds.common.errors import InputError
from higgs_ds.speech.sound_checks import RATE, at_16_khz, why_not_measurable

PACKAGES = ("speechmos", "librosa", "onnxruntime")  # speechmos does not name the others as its requirements


@dataclass(frozen=True)
class Mos:
    """Ratings from 1 to 5."""

    overall: float
    voice: float
    background: float
    p808: float


def check_dnsmos() -> None:
    """Raise InputError if a package is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--measures dnsmos: not installed: {', '.join(missing)}; pip install {' '.join(PACKAGES)}")


def rate(waveform: torch.Tensor, sample_rate: int) -> Mos:
    """Rate a mono waveform (num_samples,). One that leaves [-1, 1] is scaled down; clips below 9 s are repeated.

    Raises:
        ValueError: there is nothing to rate: the networks would rate silence like bad speech in a quiet room.
    """
    reason = why_not_measurable(waveform, sample_rate)
    if reason is not None:
        raise ValueError(f"this clip cannot be rated: {reason}")
    from speechmos import dnsmos

    samples = at_16_khz(waveform, sample_rate)
    samples = samples / samples.abs().max().clamp(min=1)
    found = dnsmos.run(samples.numpy(), sr=RATE)
    return Mos(*(float(found[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")))
