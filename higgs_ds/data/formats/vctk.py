"""The `vctk` format: VCTK, a folder with texts and recordings in two trees.

txt/p225/p225_001.txt
wav48_silence_trimmed/p225/p225_001_mic1.flac    version 0.92: two microphones, each a recording of its own
wav48_silence_trimmed/p225/p225_001_mic2.flac
wav48/p225/p225_001.wav                          version 0.80

The speaker is the folder of a recording. A speaker without any text, such as p315 of version 0.92, is one fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, printable
from higgs_ds.data.formats.folders import Listing, walk
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, sample_of, transcript_of
from higgs_ds.data.formats.speakers import speaker_of_folder
from higgs_ds.model.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

TEXT_FOLDER = "txt"
_AUDIO_FOLDER = re.compile(r"wav[0-9]+.*")
_MICROPHONE = re.compile(r"_mic[0-9]+$")


def audio_folders(root: Path) -> list[Path]:
    """Return the folders of recordings beside a folder of texts; an empty list if there is no folder of texts."""
    if not (root / TEXT_FOLDER).is_dir():
        return []
    return sorted(path for path in root.iterdir() if _AUDIO_FOLDER.fullmatch(path.name) and path.is_dir())


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each recording, and a fault for each text without one."""
    folders = audio_folders(path)
    if len(folders) != 1:
        found = ", ".join(folder.name for folder in folders) or "none"
        fault = f"folder: must contain {TEXT_FOLDER} and one folder of audio, such as wav48; found {found}"
        yield Entry(printable(path), None, (printable(fault),))
        return
    spoken: set[Path] = set()  # folders of texts that have a folder of recordings
    for listing in walk(folders[0], AUDIO_SUFFIXES):
        texts = path / TEXT_FOLDER / listing.folder.relative_to(folders[0])
        if listing.files and not texts.is_dir():
            fault = f"transcript: there is no folder {texts} with the texts of its {len(listing.files)} recordings"
            yield Entry(printable(listing.folder), None, (printable(fault),))
        else:
            yield from _read_speaker(listing, texts, folders[0], options)
        yield from listing.faults
        spoken.add(texts)
    for listing in walk(path / TEXT_FOLDER, (".txt",)):
        if listing.files and listing.folder not in spoken:
            fault = f"audio: there is no folder of recordings for its {len(listing.files)} texts in {folders[0].name}"
            yield Entry(printable(listing.folder), None, (printable(fault),))
        yield from listing.faults


def _read_speaker(listing: Listing, texts: Path, root: Path, options: DataOptions) -> Iterator[Entry]:
    left = {file.stem: file for file in sorted(texts.glob("*.txt"))} if texts.is_dir() else {}
    names = set(left)
    for audio in listing.files:
        name = _MICROPHONE.sub("", audio.stem)
        left.pop(name, None)
        reading = Reading(audio, printable(audio), options)
        if name in names:
            yield build_entry((texts / f"{name}.txt", speaker_of_folder(audio, root)), reading, _build)
        else:
            fault = f"transcript: there is no {texts / name}.txt; add it or remove this audio file"
            yield Entry(reading.source, None, (printable(fault),))
    for file in left.values():
        fault = f"audio: there is no recording of it in {listing.folder}; add it or remove this text file"
        yield Entry(printable(file), None, (printable(fault),))


def _build(raw: Any, reading: Reading) -> Sample | None:
    text, speaker = raw
    return sample_of(AudioClip(reading.manifest), transcript_of(text, "transcript", reading), speaker, None, reading)
