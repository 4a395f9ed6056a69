"""A recording joined from 60 sample clips with pauses and noise, and its subtitles, whose times are approximate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from conftest import PROJECT

from higgs_ds.slicing.voice_activity import Activity, Pause

RATE = 24000
NUM_CLIPS = 60
PAUSES_S = (0.3, 1.5)
NOISE = 10 ** (-50 / 20)
OFF_BY_S = 0.3  # at most, of the times in the subtitles
VOCABULARY = "zero one two three four five six seven eight nine".split()


@dataclass(frozen=True)
class Spoken:
    """What is said in a recording, from when to when, in seconds, and the clip that it comes from."""

    start_s: float
    end_s: float
    text: str
    clip: Path


def write_recording(path: Path, num_clips: int = NUM_CLIPS) -> list[Spoken]:
    """Write the recording; return what is said in it."""
    random = np.random.default_rng(26)
    lines = (PROJECT / "samples" / "digits.jsonl").read_text(encoding="utf-8").splitlines()[:num_clips]
    parts = [_pause(random)]
    spoken, position = [], len(parts[0])
    for line in lines:
        user, assistant = json.loads(line)["messages"][-2:]
        clip = PROJECT / "samples" / assistant["content"]["audio_url"]
        samples, rate = soundfile.read(clip, dtype="float32")
        assert rate == RATE
        spoken.append(Spoken(position / RATE, (position + len(samples)) / RATE, user["content"], clip))
        parts += [samples, _pause(random)]
        position += len(samples) + len(parts[-1])
    whole = np.concatenate(parts)
    soundfile.write(path, np.clip(whole + random.normal(0, NOISE, len(whole)), -1, 1), RATE)
    return spoken


def _pause(random: np.random.Generator) -> np.ndarray:
    return np.zeros(round(random.uniform(*PAUSES_S) * RATE), np.float32)


def known_activity(spoken: list[Spoken], duration_s: float) -> Activity:
    """Return the pauses of a recording as they were made."""
    edges = [0.0, *(edge for part in spoken for edge in (part.start_s, part.end_s)), duration_s]
    gaps = list(pairwise(edges))[::2]
    return Activity(duration_s, [Pause(start, end, (start + end) / 2) for start, end in gaps])


def srt_of(spoken: list[Spoken], off_by_s: float = OFF_BY_S) -> str:
    """Return subtitles whose times are off by up to `off_by_s`."""
    random = np.random.default_rng(27)
    cues = []
    for number, part in enumerate(spoken, 1):
        start, end = (max(0.0, time + random.uniform(-off_by_s, off_by_s)) for time in (part.start_s, part.end_s))
        cues.append(f"{number}\n{_srt_time(start)} --> {_srt_time(end)}\n{part.text}\n")
    return "\n".join(cues)


def _srt_time(seconds: float) -> str:
    minutes, milliseconds = divmod(round(1000 * seconds), 60000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"
