"""The `paired` format: a folder, with sub-folders, of audio files that each have a text file of the same name.

voices/a_1.wav  voices/a_1.txt
voices/a_2.mp3  voices/a_2.txt

Files are read in natural order (2 before 10), those of a folder before its sub-folders. Names that begin with a dot are
skipped; `folders` says which links are followed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Build, Reading, build_entry, printable
from higgs_ds.data.formats.folders import walk
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, sample_of, transcript_of
from higgs_ds.model.sample import AudioClip, Entry, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

TEXT_SUFFIX = ".txt"


def read(path: Path, options: DataOptions) -> Iterator[Entry | PendingEntry]:
    """Yield an entry for each audio file of a folder, and a fault for each text file without an audio file."""
    return read_pairs(path, options, TEXT_SUFFIX, _build)


def read_pairs(path: Path, options: DataOptions, text_suffix: str, build: Build) -> Iterator[Entry | PendingEntry]:
    """Yield the entries of pairs whose text files have a suffix; `build` gets the path of a text."""
    for listing in walk(path, (*AUDIO_SUFFIXES, text_suffix)):
        by_stem: dict[str, list[Path]] = {}
        for file in listing.files:
            by_stem.setdefault(file.stem, []).append(file)
        for files in by_stem.values():
            yield from _pair(files, options, text_suffix, build)
        yield from listing.faults


def _pair(files: list[Path], options: DataOptions, text_suffix: str, build: Build) -> Iterator[Entry | PendingEntry]:
    """Yield the entry of the files with one stem, or one fault per file if they are not a pair."""
    texts = [path for path in files if path.suffix.lower() == text_suffix]
    audios = [path for path in files if path not in texts]
    if len(audios) == len(texts) == 1:
        yield functools.partial(_pair_entry, texts[0], audios[0], options, build)
        return
    for path in audios or texts:
        if not audios:
            fault = "audio: there is no audio file of the same name; add it or remove this text file"
        elif not texts:
            fault = f"transcript: there is no {text_suffix} file of the same name; add it or remove this audio file"
        else:
            names = ", ".join(other.name for other in files)
            fault = f"transcript: {names} share a name; keep one audio file and one {text_suffix} file"
        yield Entry(printable(path), None, (printable(fault),))


def _pair_entry(text: Path, audio: Path, options: DataOptions, build: Build) -> Entry:
    return build_entry(text, Reading(audio, printable(audio), options), build)


def _build(text: Any, reading: Reading) -> Sample | None:
    words = transcript_of(text, "transcript", reading)
    return sample_of(AudioClip(reading.manifest), words, None, None, reading)
