"""The `libritts` format: LibriTTS and LibriTTS-R, a folder or any folder below it.

train-clean-100/19/198/19_198_000000_000000.wav
train-clean-100/19/198/19_198_000000_000000.normalized.txt    what is spoken; it is used
train-clean-100/19/198/19_198_000000_000000.original.txt      used if there is no normalized text

Speakers come from the names of folders and files. Other text files are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, printable
from higgs_ds.data.formats.folders import Listing
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, sample_of, transcript_of
from higgs_ds.data.formats.speakers import speaker_of_chapter
from higgs_ds.data.formats.splits import read_split
from higgs_ds.model.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

TEXT_ENDINGS = (".normalized.txt", ".original.txt")  # the first that exists is read


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each audio file, and a fault for each text without an audio file."""
    return read_split(path, (*AUDIO_SUFFIXES, ".txt"), options, _read_folder)


def _read_folder(listing: Listing, options: DataOptions) -> Iterator[Entry]:
    texts: dict[str, list[Path]] = {}
    for ending in TEXT_ENDINGS:
        for file in listing.files:
            if file.name.endswith(ending):
                texts.setdefault(file.name.removesuffix(ending), []).append(file)
    audios = [file for file in listing.files if file.suffix.lower() in AUDIO_SUFFIXES]
    seen: set[str] = set()
    for audio in audios:
        if audio.stem in seen:
            fault = "audio: there are several audio files of this name; keep one of them"
            yield Entry(printable(audio), None, (fault,))
        elif audio.stem not in texts:
            fault = f"transcript: there is no {' or '.join(TEXT_ENDINGS)} file of the same name; add it"
            yield Entry(printable(audio), None, (fault,))
        else:
            reading = Reading(audio, printable(audio), options)
            yield build_entry(texts[audio.stem][0], reading, _build)
        seen.add(audio.stem)
    for stem, files in texts.items():
        if stem not in seen:
            fault = "audio: there is no audio file of the same name; add it or remove this text file"
            yield Entry(printable(files[0]), None, (fault,))


def _build(text: Any, reading: Reading) -> Sample | None:
    words = transcript_of(text, "transcript", reading)
    return sample_of(AudioClip(reading.manifest), words, speaker_of_chapter(reading.manifest, "_"), None, reading)
