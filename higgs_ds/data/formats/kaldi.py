"""The `kaldi` format: a data folder of Kaldi, as ESPnet, WeNet and CosyVoice prepare it too. Lines are `ID VALUE`.

wav.scp   rec_1 clips/rec_1.wav          the file of a recording
text      rec_1-1 GOOD MORNING           what is spoken in an utterance
segments  rec_1-1 rec_1 0.5 2.25         optional: the part of a recording, in seconds; without it, IDs are recordings'
utt2spk   rec_1-1 anna                   optional: the speaker
utt2lang  rec_1-1 en                     optional: the language

Files may be in any order. Paths are relative to the folder. Commands in wav.scp (`sph2pipe ... |`) are refused and
never run, and so are places in Kaldi's archives (`raw.ark:17`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, path_of, printable, shown
from higgs_ds.data.formats.keyed_lines import KeyedLines
from higgs_ds.data.formats.recordings import sample_of, words_of
from higgs_ds.model.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

FILE_NAME, TEXT = "wav.scp", "text"
SEGMENTS, SPEAKERS, LANGUAGES = "segments", "utt2spk", "utt2lang"
TO_THE_END = -1.0  # as the end of a segment
_SECONDS = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_ARCHIVE = re.compile(r":[0-9]+$")


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each line of `text`, and a fault for each line of wav.scp or segments that has none."""
    names = [FILE_NAME, TEXT, *(name for name in (SEGMENTS, SPEAKERS, LANGUAGES) if (path / name).is_file())]
    with contextlib.ExitStack() as stack:
        tables = {name: stack.enter_context(KeyedLines(path / name)) for name in names}
        build = functools.partial(_build, tables)
        for line in tables[TEXT]:
            yield build_entry(line, Reading(path / TEXT, f"{printable(path / TEXT)}:{line.number}", options), build)
        for name in names[:1] + names[2:]:
            yield from _unused(tables, name)


def _unused(tables: dict[str, KeyedLines], name: str) -> Iterator[Entry]:
    """Yield the faults of the lines of a file that no line of `text` refers to."""
    table = tables[name]
    for line in table.unused():
        first = table.is_repeated(line)
        if first:
            fault = f"line: {shown(line.key)} is given twice, first in line {first}; keep one of them"
        elif name in (SPEAKERS, LANGUAGES):
            continue
        elif name == FILE_NAME and SEGMENTS in tables:
            fault = f"line: no segment with a text is of recording {shown(line.key)}; add one or remove this line"
        else:
            fault = f"line: {TEXT} has no line for {shown(line.key)}; add it or remove this line"
        yield Entry(f"{printable(table.path)}:{line.number}", None, (fault,))


def _build(tables: dict[str, KeyedLines], line: Any, reading: Reading) -> Sample | None:
    first = tables[TEXT].is_repeated(line)
    if first:
        reading.report("line", f"{shown(line.key)} is given twice, first in line {first}; keep one of them")
        return None
    if line.fault:
        reading.report("line", line.fault)
    words = None if line.fault else words_of(line.value, "text", reading)
    clip = _clip(tables, line.key, reading)
    speaker, language = (_name(tables, name, line.key, reading) for name in (SPEAKERS, LANGUAGES))
    return sample_of(clip, words, speaker, language, reading)


def _find(tables: dict[str, KeyedLines], name: str, key: str, reading: Reading) -> tuple[str, str] | None:
    """Return where the line of a key is, for messages, and its value; report a line that is missing or has a fault."""
    line = tables[name].take(key)
    if line is None:
        reading.report(name, f"has no line for {shown(key)}; add it")
        return None
    where = f"{name}:{line.number}"
    if line.fault or not line.value:
        reading.report(where, line.fault or "has nothing after the ID")
        return None
    return where, line.value


def _name(tables: dict[str, KeyedLines], name: str, key: str, reading: Reading) -> str | None:
    found = _find(tables, name, key, reading) if name in tables else None
    return None if found is None else words_of(found[1], found[0], reading)


def _clip(tables: dict[str, KeyedLines], key: str, reading: Reading) -> AudioClip | None:
    if SEGMENTS not in tables:
        path = _path(tables, key, reading)
        return None if path is None else AudioClip(path)
    found = _find(tables, SEGMENTS, key, reading)
    if found is None:
        return None
    where, value = found
    fields = value.split()
    if len(fields) != 3:
        more = "; a channel is not supported: write each to a file of its own" if len(fields) == 4 else ""
        reading.report(where, f"must have a recording, a start and an end, but has {shown(value)}{more}")
        return None
    recording, *times = fields
    path = _path(tables, recording, reading)
    if not all(map(_SECONDS.fullmatch, times)):
        reading.report(where, f"start and end must be seconds, but are {shown(' '.join(times))}")
        return None
    start, end = map(float, times)
    if start < 0 or (end <= start and end != TO_THE_END) or not math.isfinite(start + end):
        reading.report(where, f"must start at 0 or later and end after that, but is from {times[0]} to {times[1]}")
        return None
    if path is None:
        return None
    return AudioClip(path, start, None if end == TO_THE_END else end - start)


def _path(tables: dict[str, KeyedLines], key: str, reading: Reading) -> Path | None:
    found = _find(tables, FILE_NAME, key, reading)
    if found is None:
        return None
    where, name = found
    if name.startswith("|") or name.endswith("|"):
        reading.report(where, f"{shown(name)} is a command, and none is run; write its output to a file and name that")
    elif name == "-":
        reading.report(where, "is the standard input; name a file")
    elif _ARCHIVE.search(name):
        reading.report(where, f"{shown(name)} is a place in an archive; name an audio file (wav-copy writes them)")
    else:
        return path_of(name, where, reading)
    return None
