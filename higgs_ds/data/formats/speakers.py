"""The speaker of a clip, from where the layout of a corpus puts it."""

from __future__ import annotations

import os
import re
from pathlib import Path


def speaker_of_chapter(file: Path, separator: str) -> str | None:
    """Return the speaker of SPEAKER/CHAPTER/SPEAKER_CHAPTER_..., as in LibriTTS (`_`) and LibriSpeech (`-`).

    A file whose name does not begin with the names of its folders has a speaker only if it begins with two numbers, as
    all files of these corpora do.
    """
    folder = Path(os.path.abspath(file.parent))
    speaker, chapter = folder.parent.name, folder.name
    if speaker and file.name.startswith(f"{speaker}{separator}{chapter}{separator}"):
        return speaker
    match = re.match(rf"([0-9]+){separator}[0-9]+{separator}", file.name)
    return match[1] if match else None


def speaker_of_folder(file: Path, root: Path) -> str | None:
    """Return the name of the folder that contains a file, or None for a file in `root` itself."""
    return file.parent.name if file.parent != root else None
