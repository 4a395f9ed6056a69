"""The `paired` format: a folder, with sub-folders, of audio files that each have a text file of the same name.

voices/a_1.wav  voices/a_1.txt
voices/a_2.mp3  voices/a_2.txt

Files are read in natural order (2 before 10), those of a folder before its sub-folders. Names that begin with a dot are
skipped; `folders` says which links are followed.
"""

from __future__ import annotations

import functools
import os
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
        by_stem: dict[str, list[str]] = {}
        for name in listing.names:
            by_stem.setdefault(os.path.splitext(name)[0], []).append(name)
        entry_of = functools.partial(_pair_entry, listing.folder, options, build)
        for names in by_stem.values():
            texts = [name for name in names if name.lower().endswith(text_suffix)]
            audios = [name for name in names if name not in texts]
            if len(audios) == len(texts) == 1:
                yield functools.partial(entry_of, texts[0], audios[0])
            else:
                yield from _faults(listing.folder, names, audios, text_suffix)
        yield from listing.faults


def _faults(folder: Path, names: list[str], audios: list[str], text_suffix: str) -> Iterator[Entry]:
    """Yield the faults of files with one stem that are no pair: one for each audio file, or for each text if none."""
    for name in audios or names:
        if not audios:
            fault = "audio: there is no audio file of the same name; add it or remove this text file"
        elif len(audios) == len(names):
            fault = f"transcript: there is no {text_suffix} file of the same name; add it or remove this audio file"
        else:
            fault = f"transcript: {', '.join(names)} share a name; keep one audio file and one {text_suffix} file"
        yield Entry(printable(folder / name), None, (printable(fault),))


def _pair_entry(folder: Path, options: DataOptions, build: Build, text: str, audio: str) -> Entry:
    path = folder / audio
    return build_entry(folder / text, Reading(path, printable(path), options), build)


def _build(text: Any, reading: Reading) -> Sample | None:
    words = transcript_of(text, "transcript", reading)
    return sample_of(AudioClip(reading.manifest), words, None, None, reading)
