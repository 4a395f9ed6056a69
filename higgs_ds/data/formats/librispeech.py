"""The `librispeech` format: LibriSpeech, a folder or any folder below it.

train-clean-100/84/121123/84-121123-0000.flac
train-clean-100/84/121123/84-121123.trans.txt    a line for each file of the folder: 84-121123-0000 GO DO YOU HEAR

Speakers come from the names of folders and files. Other text files are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, printable, shown
from higgs_ds.data.formats.folders import Listing
from higgs_ds.data.formats.jsonio import text_lines
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, sample_of, words_of
from higgs_ds.data.formats.speakers import speaker_of_chapter
from higgs_ds.data.formats.splits import read_split
from higgs_ds.model.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

TEXT_ENDING = ".trans.txt"


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each line of the transcripts, and a fault for each audio file without a line."""
    return read_split(path, (*AUDIO_SUFFIXES, ".txt"), options, _read_folder)


def _read_folder(listing: Listing, options: DataOptions) -> Iterator[Entry]:
    audios: dict[str, list[Path]] = {}
    for file in listing.files:
        if file.suffix.lower() in AUDIO_SUFFIXES:
            audios.setdefault(file.stem, []).append(file)
    seen: set[str] = set()
    for path in (file for file in listing.files if file.name.endswith(TEXT_ENDING)):
        shown_path = printable(path)
        for line in text_lines(path):
            name, _, words = line.text.strip().partition(" ")
            reading = Reading(path, f"{shown_path}:{line.number}", options)
            if line.fault:
                yield Entry(reading.source, None, (f"line: {line.fault}",))
            elif name in seen:
                yield Entry(reading.source, None, (f"line: {shown(name)} has a line before; keep one of them",))
            elif name:
                yield build_entry((name, words, audios.get(name, [])), reading, _build)
            seen.add(name)
    for name, files in audios.items():
        if name not in seen:
            fault = f"transcript: no {TEXT_ENDING} file of this folder has a line for it; add it or remove this file"
            yield from (Entry(printable(file), None, (fault,)) for file in files)


def _build(raw: Any, reading: Reading) -> Sample | None:
    name, words, files = raw
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        reading.report("audio", f"there must be one audio file {shown(name)} beside this file; found {found}")
        return None
    words = words_of(words, "transcript", reading)
    return sample_of(AudioClip(files[0]), words, speaker_of_chapter(files[0], "-"), None, reading)
