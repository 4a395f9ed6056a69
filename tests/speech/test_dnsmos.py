"""Ratings of sound fall with noise, and are those of speechmos."""

from __future__ import annotations

import pytest
import soundfile
import torch
from conftest import VOICES
from speechmos import dnsmos
from torchaudio.functional import resample

from higgs_ds.speech.dnsmos import rate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("clip", ["anna_00.flac", "ben_00.flac"])
def test_falls_with_noise(clip: str) -> None:
    samples, sample_rate = soundfile.read(VOICES / clip, dtype="float32")
    waveform = torch.from_numpy(samples)
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))
    power = waveform.square().mean()
    noisy = [waveform + noise * (power / 10 ** (db / 10)).sqrt() for db in (30, 20, 10, 0)]
    overall = [rate(one, sample_rate).overall for one in (waveform, *noisy)]
    assert overall == sorted(overall, reverse=True)
    assert overall[0] > overall[-1] + 0.5


def test_is_that_of_the_package() -> None:
    samples, sample_rate = soundfile.read(VOICES / "anna_00.flac", dtype="float32")
    loud = torch.from_numpy(samples) * (3 / abs(samples).max())
    at_16_khz = resample(loud, sample_rate, 16000)
    expected = dnsmos.run((at_16_khz / at_16_khz.abs().max()).numpy(), sr=16000)
    found = rate(loud, sample_rate)
    assert found.overall == pytest.approx(expected["ovrl_mos"])
    assert found.voice == pytest.approx(expected["sig_mos"])
    assert found.background == pytest.approx(expected["bak_mos"])
    assert found.p808 == pytest.approx(expected["p808_mos"])


def test_silence_is_not_rated() -> None:
    with pytest.raises(ValueError, match="cannot be rated: silence"):
        rate(torch.zeros(24000), 24000)
