"""The pauses of a recording, by silero-vad and the level of the sound; read in blocks, whatever its length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio

from higgs_ds.common.threads import one_thread
from higgs_ds.data.audio import RESAMPLING, mono_blocks

RATE = 16000  # silero-vad takes 8 or 16 kHz, and multiples of 16, but not the codec's 24
WINDOW = 512  # samples for each probability
CHUNK_S = 32  # resampled at a time: whole windows
CONTEXT_S = 1  # on both sides of a chunk, far more than the filters for resampling are long
HOP = 160  # samples of a level: 10 ms
SMOOTHED = 11  # levels that are averaged, 0.1 s, to find where a pause is quiet
AS_QUIET_DB = 3.0  # a point that is louder than the quietest one by less may be closer to the middle
SPEECH_PROBABILITY = 0.5  # silero-vad's default; speech ends below 0.15 less
SHORTEST_SPEECH_S = 0.1
FLOOR = 1e-10  # -100 dB


@dataclass(frozen=True)
class Pause:
    """A stretch without speech, in seconds, and the quiet point in it where a cut would be. Both ends are pauses."""

    start_s: float
    end_s: float
    cut_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Activity:
    """The pauses of a recording: between two of them is speech. The first is its beginning, the last its end."""

    duration_s: float
    pauses: list[Pause]

    @property
    def speech_s(self) -> float:
        return self.duration_s - sum(pause.duration_s for pause in self.pauses)


def find_pauses(path: Path, min_pause_s: float, advance: Callable[[float], Any]) -> Activity:
    """Find the pauses of a recording that are at least `min_pause_s` long.

    Args:
        advance: called with the seconds that have been processed since the last call.

    Raises:
        AudioError: the recording cannot be read, or its sample rate cannot be resampled.
    """
    probabilities, powers, num_samples = [], [], 0
    # The import of silero_vad sets torch to one thread, and for the rest of the process too if it is not set back.
    with one_thread(), torch.no_grad():
        model = _load_model()
        model.reset_states()
        for chunk in resampled(path):
            windows = torch.nn.functional.pad(chunk, (0, -len(chunk) % WINDOW)).view(-1, WINDOW)
            probabilities += [float(model(window, RATE)) for window in windows]
            powers.append(chunk[: len(chunk) // HOP * HOP].view(-1, HOP).square().mean(dim=1).numpy())
            num_samples += len(chunk)
            advance(len(chunk) / RATE)
    speech = _speech(probabilities, num_samples, min_pause_s)
    return Activity(num_samples / RATE, _pauses_between(speech, np.concatenate(powers), num_samples / RATE))


def resampled(path: Path) -> Iterator[torch.Tensor]:
    """Yield a recording at 16 kHz, mono, in chunks of CHUNK_S seconds; they equal those of the whole, resampled."""
    with mono_blocks(path, RATE) as (rate, blocks):
        held, start, done = np.zeros(0, np.float32), 0, 0  # `held` begins at sample `start`; `done` are yielded
        for block in blocks:
            held = np.concatenate([held, block])
            while start + len(held) >= done + (CHUNK_S + CONTEXT_S) * rate:
                yield _resample(held, done - start, CHUNK_S * rate, rate)
                done += CHUNK_S * rate
                kept_from = done - CONTEXT_S * rate
                held, start = held[kept_from - start :], kept_from
        if start + len(held) > done:
            yield _resample(held, done - start, start + len(held) - done, rate)


def _resample(held: np.ndarray, first: int, count: int, rate: int) -> torch.Tensor:
    """Return `count` samples from `first` on, resampled. `first` is a whole number of seconds."""
    around = torch.from_numpy(held[: first + count + CONTEXT_S * rate])
    whole = torchaudio.functional.resample(around, rate, RATE, **RESAMPLING)
    begin = first * RATE // rate
    return whole[begin : begin - (-count * RATE // rate)]


@functools.cache
def _load_model() -> Any:
    """Load the model that is part of the package silero-vad."""
    from silero_vad import load_silero_vad

    return load_silero_vad()


def _speech(probabilities: list[float], num_samples: int, min_pause_s: float) -> list[tuple[float, float]]:
    """Return the stretches of speech, in seconds; shorter pauses are part of the speech."""
    from silero_vad import get_speech_timestamps_from_probs

    found = get_speech_timestamps_from_probs(
        probabilities,
        sampling_rate=RATE,
        threshold=SPEECH_PROBABILITY,
        min_speech_duration_ms=round(1000 * SHORTEST_SPEECH_S),
        min_silence_duration_ms=round(1000 * min_pause_s),
        speech_pad_ms=0,
        audio_length_samples=num_samples,
    )
    return [(stretch["start"] / RATE, stretch["end"] / RATE) for stretch in found]


def _pauses_between(speech: list[tuple[float, float]], powers: np.ndarray, duration_s: float) -> list[Pause]:
    smooth = 10 * np.log10(np.convolve(powers, np.ones(SMOOTHED) / SMOOTHED, "same") + FLOOR)
    starts = [0.0, *(end for _, end in speech)]
    ends = [*(start for start, _ in speech), duration_s]
    pauses = [Pause(start, end, _quiet_point(smooth, start, end)) for start, end in zip(starts, ends, strict=True)]
    if speech:  # nothing needs to be kept clear of beyond the ends of a recording
        pauses[0] = Pause(0.0, pauses[0].end_s, 0.0)
        pauses[-1] = Pause(pauses[-1].start_s, duration_s, duration_s)
    return pauses


def _quiet_point(levels_db: np.ndarray, start_s: float, end_s: float) -> float:
    """Return where a pause is quiet, in seconds: of the points within 3 dB of the quietest, that nearest its middle."""
    first, last = round(start_s * RATE / HOP), round(end_s * RATE / HOP)
    inside = levels_db[first:last]
    middle = (start_s + end_s) / 2
    if not len(inside):
        return middle
    times = (np.arange(first, first + len(inside)) + 0.5) * HOP / RATE
    quiet = times[inside <= inside.min() + AS_QUIET_DB]
    return float(quiet[np.abs(quiet - middle).argmin()])
