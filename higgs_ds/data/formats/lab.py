"""The `lab` format: audio files, each with its words in a `.lab` file of the same name, in a folder of its speaker.

anna/a_1.wav  anna/a_1.lab    as the Montreal Forced Aligner and fish-speech read them
ben/b_1.mp3   ben/b_1.lab

The speaker is the folder that contains a file; files in the given folder itself have none. Files of the same suffix
that hold labels and not words, such as those of HTK with a start and an end on each line, are refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, shown
from higgs_ds.data.formats.paired import read_pairs
from higgs_ds.data.formats.recordings import sample_of, transcript_of
from higgs_ds.data.formats.speakers import speaker_of_folder
from higgs_ds.model.sample import AudioClip, Entry, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

TEXT_SUFFIX = ".lab"
SHORTEST_TIME = 10_000  # of HTK, in units of 100 ns: a millisecond. Two smaller numbers may begin a sentence
LONGEST_PHONE = 4  # characters
_TIMES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s+([0-9]+(?:\.[0-9]+)?)(?:\s+\S.*)?")
_PHONE = re.compile(rf"[A-Za-z][\w#@^-]{{0,{LONGEST_PHONE - 1}}}", re.ASCII)


def read(path: Path, options: DataOptions) -> Iterator[Entry | PendingEntry]:
    """Yield an entry for each audio file of a folder, and a fault for each `.lab` file without an audio file."""
    return read_pairs(path, options, TEXT_SUFFIX, functools.partial(_build, path))


def _build(root: Path, text: Any, reading: Reading) -> Sample | None:
    words = transcript_of(text, "transcript", reading)
    labels = words and _labels_in(words)
    if labels:
        reading.report("transcript", f"{text.name} holds {labels}; give the words that are spoken")
    return sample_of(AudioClip(reading.manifest), words, speaker_of_folder(reading.manifest, root), None, reading)


def _labels_in(text: str) -> str:
    """Return what a file holds if these are labels, else an empty string."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines[0] == "#!MLF!#":
        return "labels of HTK"
    if "#" in lines:
        return "labels of Festival or ESPS, with times"
    times = [_TIMES.fullmatch(line) for line in lines]
    if all(times) and all(_are_times(match, len(lines)) for match in times if match):
        return f"labels with times, such as {shown(lines[0])}"
    if len(lines) > 2 and all(map(_PHONE.fullmatch, lines)):
        return f"one label on each line, such as {shown(lines[0])}"
    return ""


def _are_times(match: re.Match[str], num_lines: int) -> bool:
    start, end = float(match[1]), float(match[2])
    return start < end and (num_lines > 1 or end >= SHORTEST_TIME or "." in match[1])
