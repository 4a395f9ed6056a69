"""Measure a clip while it is decoded: silence, level, DC offset, clipping, bandwidth. Nothing is judged here."""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import struct
from typing import NamedTuple

import numpy as np

FULL_SCALE = 0.999
FRAMES_PER_S = 100
WINDOW = 256  # samples of a spectrum
WINDOWS_PER_S, MIN_WINDOWS = 5, 48  # more in short clips, which have few consonants
CONTENT_DB = 60.0  # below the strongest frequency, where content ends; upsampled speech falls by more at its old limit
LOWEST_BIN = 2  # of a spectrum: those below are DC
AT_A_TIME = 2**17  # samples: temporary arrays stay in the CPU's cache
QUIETEST_DB = -120.0
_STRUCT = struct.Struct("<q10f")


class ClipQuality(NamedTuple):
    """Measurements of a clip as it is decoded, before trimming and resampling, mixed down to mono.

    All numbers but `audio` are rounded to float32, as they are stored. Levels are of the RMS about the mean, in dBFS: 0
    is a square wave at full scale, and -3.01 a sine.
    """

    audio: int  # equal for clips with the same samples, whatever their files
    duration_s: float
    start_s: float  # silence before the first frame of 10 ms that is not silent
    end_s: float
    pause_s: float  # longest silence between two such frames
    level_dbfs: float  # of the frames that are not silent
    dc_offset: float  # mean, as a fraction of full scale
    clipped: float  # fraction of the samples at full scale
    cutoff_hz: float  # highest frequency with content
    rate_hz: float
    silence_db: float  # below the loudest frame, at which a frame is silent

    @property
    def speech_s(self) -> float:
        """Duration without the silence at both ends."""
        return self.duration_s - self.start_s - self.end_s

    def has_silence_db(self, silence_db: float) -> bool:
        return self.silence_db == np.float32(silence_db)

    def packed(self) -> bytes:
        """Return the values in the layout of CLIP."""
        return _STRUCT.pack(*self)

    def encoded(self) -> str:
        return base64.b64encode(self.packed()).decode()


# The same values in an array.
CLIP = np.dtype([("audio", "<i8"), *((name, "<f4") for name in ClipQuality._fields[1:])])


def decoded(text: str) -> ClipQuality:
    """Return what `encoded` has written. Raises ValueError."""
    try:
        return ClipQuality(*_STRUCT.unpack(base64.b64decode(text, validate=True)))
    except (struct.error, binascii.Error) as error:
        raise ValueError(f"not measurements of a clip: {text!r}") from error


class ClipMeter:
    """Measures a clip block by block; keeps two numbers for each 10 ms of it."""

    def __init__(self, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self.num_samples = 0
        self.peak = 0.0
        self._num_clipped = 0
        self._num_channels = 1
        self._frame = max(1, rate_hz // FRAMES_PER_S)
        self._left = np.zeros(0, np.float32)  # samples after the last whole frame
        self._sums: list[np.ndarray] = []  # of the samples of each frame
        self._squares: list[np.ndarray] = []
        self._spectrum = np.zeros(WINDOW // 2 + 1)
        self._audio = hashlib.blake2b(digest_size=8)

    def add(self, block: np.ndarray) -> None:
        """Measure the next samples, float32 (n, channels)."""
        self._num_channels = block.shape[1]
        for start in range(0, len(block), AT_A_TIME):
            part = block[start : start + AT_A_TIME]
            peak = max(float(part.max()), -float(part.min()))
            self.peak = max(self.peak, peak)
            if peak >= FULL_SCALE:
                self._num_clipped += int(np.count_nonzero(np.abs(part) >= FULL_SCALE))
            self.num_samples += len(part)
            self._add_mono(part[:, 0] if self._num_channels == 1 else part.mean(axis=1))

    def _add_mono(self, samples: np.ndarray) -> None:
        if len(self._left):
            samples = np.concatenate([self._left, samples])
        count = len(samples) // self._frame
        frames = samples[: count * self._frame].reshape(count, self._frame)
        self._add_frames(frames)
        self._left = samples[count * self._frame :].copy()
        spacing = max(WINDOW, min(self.rate_hz // WINDOWS_PER_S, len(samples) // MIN_WINDOWS))
        if len(samples) >= WINDOW:
            whole = samples[: len(samples) // spacing * spacing].reshape(-1, spacing)
            windows = whole[:, :WINDOW] if len(whole) else samples[None, :WINDOW]
            spectra = np.fft.rfft(windows * _HANN)
            self._spectrum += np.einsum("ij,ij->j", spectra.real, spectra.real)
            self._spectrum += np.einsum("ij,ij->j", spectra.imag, spectra.imag)

    def _add_frames(self, frames: np.ndarray) -> None:
        self._sums.append(frames.sum(axis=1))
        self._squares.append(np.einsum("ij,ij->i", frames, frames))
        self._audio.update(frames[:, 0].tobytes())  # sums may differ in their last bit between machines

    def finish(self, silence_db: float) -> tuple[ClipQuality, int, int]:
        """Return the measurements of a clip of one sample or more, and the bounds of its sound, in samples."""
        if len(self._left):
            self._add_frames(self._left[None])
        sums, squares = (np.concatenate(parts, dtype=np.float64) for parts in (self._sums, self._squares))
        mean = float(sums.sum()) / self.num_samples
        power = squares - 2 * mean * sums
        power[-1] *= self._frame / (len(self._left) or self._frame)
        power = np.maximum(power / self._frame + mean**2, 0)
        loud = np.flatnonzero(power >= power.max() * 10 ** (-silence_db / 10))
        start, stop = int(loud[0]) * self._frame, min((int(loud[-1]) + 1) * self._frame, self.num_samples)
        level = float(power[loud].mean())
        self._audio.update(self.num_samples.to_bytes(8, "little"))
        quality = ClipQuality(
            audio=int.from_bytes(self._audio.digest(), "little", signed=True),
            duration_s=self.num_samples / self.rate_hz,
            start_s=start / self.rate_hz,
            end_s=(self.num_samples - stop) / self.rate_hz,
            pause_s=(int(np.diff(loud).max(initial=1)) - 1) * self._frame / self.rate_hz,
            level_dbfs=max(QUIETEST_DB, 10 * math.log10(level)) if level else QUIETEST_DB,
            dc_offset=mean,
            clipped=self._num_clipped / (self.num_samples * self._num_channels),
            cutoff_hz=self._cutoff_hz(),
            rate_hz=self.rate_hz,
            silence_db=silence_db,
        )
        return decoded(quality.encoded()), start, stop

    def _cutoff_hz(self) -> float:
        """Return the highest frequency within CONTENT_DB of the strongest; half the rate for a clip without any."""
        smooth = np.convolve(self._spectrum, np.ones(3), "same")[LOWEST_BIN:]
        content = np.flatnonzero(smooth > smooth.max() * 10 ** (-CONTENT_DB / 10))
        if not len(content):
            return self.rate_hz / 2
        return (int(content[-1]) + LOWEST_BIN) * self.rate_hz / WINDOW


_HANN = np.hanning(WINDOW).astype(np.float32)
