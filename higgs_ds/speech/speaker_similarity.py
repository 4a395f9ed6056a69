"""Speaker similarity: the cosine of two clips' speaker embeddings, by the model of Resemblyzer or one of transformers.

Resemblyzer's package cannot be imported beside current versions of setuptools, so that only its weights are used: those
of the generalized end-to-end loss (Wan et al. 2018, arXiv 1710.10467), in mel frames of 25 ms.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol

import torch
import torchaudio
from torch import nn

from higgs_ds.common.errors import InputError
from higgs_ds.options.fields import RESEMBLYZER
from higgs_ds.speech.sound_checks import RATE, at_16_khz, why_not_measurable

INSTALL = "pip install --no-deps Resemblyzer==0.1.4"
LEVEL = 10 ** (-30 / 20)  # RMS to which a clip is scaled
NUM_MELS, WIDTH, FRAMES_AT_ONCE = 40, 256, 160  # of the model; 160 frames are 1.6 s
STEP = 77  # frames between the beginnings of two stretches, 1.3 in a second
COVERED = 0.75  # of the last stretch that the clip has to fill, else the stretch is left out


class Encoder(Protocol):
    """Turns a clip into a speaker embedding of length 1, float32 (D,)."""

    def __call__(self, waveform: torch.Tensor, sample_rate: int) -> torch.Tensor: ...


def open_speaker_encoder(name: str, device: torch.device) -> Encoder:
    """Open Resemblyzer's model, or an x-vector model of transformers (WavLM, for instance) by folder or hub id.

    Raises:
        InputError: there is no such model, or the weights of Resemblyzer are not installed.
    """
    return _Resemblyzer(device) if name == RESEMBLYZER else _open_transformers(name, device)


def similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the cosine of two embeddings of length 1: 1 for the same voice; those of two speakers have less."""
    return float(first @ second)


class _Resemblyzer(nn.Module):
    """An LSTM over mel frames, whose last output becomes the embedding of 1.6 s; a clip has the mean of several."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        path = _weights()
        if path is None:
            raise InputError(f"--measures similarity: the weights of {RESEMBLYZER} are not installed; {INSTALL}")
        self.lstm = nn.LSTM(NUM_MELS, WIDTH, 3, batch_first=True)
        self.linear = nn.Linear(WIDTH, WIDTH)
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        own = ("lstm.", "linear.")
        self.load_state_dict({name: tensor for name, tensor in state.items() if name.startswith(own)})
        self.mel = torchaudio.transforms.MelSpectrogram(
            RATE, n_fft=400, hop_length=160, n_mels=NUM_MELS, norm="slaney", mel_scale="slaney"
        )
        self.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.inference_mode()
    def forward(self, waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
        _check(waveform, sample_rate)
        samples = at_16_khz(waveform, sample_rate)
        samples = samples * (LEVEL / samples.square().mean().sqrt())
        frames = self.mel(samples.to(self.device)).T
        starts = [0, *range(STEP, len(frames) - int(COVERED * FRAMES_AT_ONCE), STEP)]
        padded = nn.functional.pad(frames, (0, 0, 0, FRAMES_AT_ONCE))
        outputs, _ = self.lstm(torch.stack([padded[start : start + FRAMES_AT_ONCE] for start in starts]))
        parts = nn.functional.normalize(self.linear(outputs[:, -1]).relu(), dim=1)
        return nn.functional.normalize(parts.mean(dim=0), dim=0).cpu()


def _weights() -> Path | None:
    found = importlib.util.find_spec(RESEMBLYZER)  # does not import it
    path = Path(found.origin).with_name("pretrained.pt") if found and found.origin else None
    return path if path is not None and path.is_file() else None


def _open_transformers(name: str, device: torch.device) -> Encoder:
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    try:
        extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForAudioXVector.from_pretrained(name, trust_remote_code=False).to(device).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"--speaker_model {name}: is not an x-vector model that transformers can load: {error}"
        ) from error
    if extractor.sampling_rate != RATE:
        raise InputError(
            f"--speaker_model {name}: takes speech at {extractor.sampling_rate} Hz; a model for {RATE} Hz is needed"
        )

    @torch.inference_mode()
    def encode(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
        _check(waveform, sample_rate)
        samples = at_16_khz(waveform, sample_rate)
        inputs = extractor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").to(device)
        return nn.functional.normalize(model(**inputs).embeddings[0].float(), dim=0).cpu()

    return encode


def _check(waveform: torch.Tensor, sample_rate: int) -> None:
    reason = why_not_measurable(waveform, sample_rate)
    if reason is not None:
        raise ValueError(f"no speaker can be heard in this clip: {reason}")
