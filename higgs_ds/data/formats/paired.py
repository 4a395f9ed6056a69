"""The `paired` format: a folder, with sub-folders, of audio files that each have a text file of the same name.

voices/a_1.wav  voices/a_1.txt
voices/a_2.mp3  voices/a_2.txt

Files are read in natural order (2 before 10), those of a folder before its sub-folders. Names that begin with a dot are
skipped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, printable
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, sample_of, transcript_of
from higgs_ds.data.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

TEXT_SUFFIX = ".txt"


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each audio file of a folder, and a fault for each text file without an audio file."""
    pending = [(path, frozenset[Path]())]  # folders, each with the folders that contain it
    while pending:
        folder, ancestors = pending.pop()
        resolved = folder.resolve()
        if resolved in ancestors:
            yield Entry(printable(folder), None, ("folder: is a link to a folder that contains it; remove the link",))
            continue
        with os.scandir(folder) as scan:
            found = sorted((entry for entry in scan if not entry.name.startswith(".")), key=natural_key)
        by_stem: dict[str, list[Path]] = {}
        for entry in found:
            file = Path(entry.path)
            if file.suffix.lower() in (*AUDIO_SUFFIXES, TEXT_SUFFIX) and not entry.is_dir():
                by_stem.setdefault(file.stem, []).append(file)
        for files in by_stem.values():
            yield from _pair(files, options)
        pending += [(Path(entry.path), ancestors | {resolved}) for entry in reversed(found) if entry.is_dir()]


def _pair(files: list[Path], options: DataOptions) -> Iterator[Entry]:
    """Yield the entry of the files with one stem, or one fault per file if they are not a pair."""
    texts = [path for path in files if path.suffix.lower() == TEXT_SUFFIX]
    audios = [path for path in files if path not in texts]
    if len(audios) == len(texts) == 1:
        yield build_entry(texts[0], Reading(audios[0], printable(audios[0]), options), _build)
        return
    for path in audios or texts:
        if not audios:
            fault = "audio: there is no audio file of the same name; add it or remove this text file"
        elif not texts:
            fault = f"transcript: there is no {TEXT_SUFFIX} file of the same name; add it or remove this audio file"
        else:
            names = ", ".join(other.name for other in files)
            fault = f"transcript: {names} share a name; keep one audio file and one {TEXT_SUFFIX} file"
        yield Entry(printable(path), None, (printable(fault),))


def _build(text: Any, reading: Reading) -> Sample | None:
    words = transcript_of(text, "transcript", reading)
    return sample_of(AudioClip(reading.manifest), words, None, None, reading)


def natural_key(entry: os.DirEntry[str]) -> tuple[list[str | int], str]:
    """Return a sort key that orders names by the numbers in them."""
    pieces = re.split(r"([0-9]+)", entry.name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], entry.name
