"""The sound of a clip as a browser plays it, and the range of its bytes that a browser asks for."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from higgs_ds.data.audio import AudioError, as_wav
from higgs_ds.data.index import stamp_of
from higgs_ds.model.sample import AudioClip

LONGEST_PART_S = 600.0  # decoded for the page
# Whole files of these suffixes are sent unchanged.
PLAYED_BY_BROWSERS = {
    ".wav": "audio/wav", ".flac": "audio/flac", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".opus": "audio/ogg",
    ".m4a": "audio/mp4", ".aac": "audio/aac",
}  # fmt: skip
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


@dataclass(frozen=True)
class Sound:
    """An audio file to send."""

    file: BinaryIO
    num_bytes: int
    content_type: str


@contextlib.contextmanager
def sound_of(clip: AudioClip) -> Iterator[Sound]:
    """Open the sound of a clip: its file, or as WAV the part of a file or what browsers do not play.

    Raises:
        AudioError: it cannot be read.
    """
    is_whole = clip.data is None and not clip.offset_s and clip.duration_s is None
    content_type = PLAYED_BY_BROWSERS.get(clip.path.suffix.lower())
    with contextlib.ExitStack() as stack:
        if is_whole and content_type is not None and clip.path.is_file():
            try:
                file = stack.enter_context(clip.path.open("rb"))
            except OSError as error:
                raise AudioError(f"cannot be read: {error.strerror}") from error
            yield Sound(file, os.fstat(file.fileno()).st_size, content_type)
        else:
            content = _decoded(clip, stamp_of(str(clip.path)))
            yield Sound(io.BytesIO(content), len(content), "audio/wav")


@functools.lru_cache(maxsize=2)  # a browser asks for the same part several times
def _decoded(clip: AudioClip, stamp: tuple[int, int] | None) -> bytes:
    return as_wav(clip, LONGEST_PART_S)


def byte_range(header: str | None, num_bytes: int) -> range | None:
    """Return the bytes that a Range header asks for, an empty range if the file has none of them.

    None stands for the whole file: for no header, several ranges, or another unit (RFC 9110, 14.2).
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or not (match[1] or match[2]) or (match[1] and match[2] and int(match[2]) < int(match[1])):
        return None
    if not match[1]:
        return range(max(0, num_bytes - int(match[2])), num_bytes)
    return range(int(match[1]), min(int(match[2]) + 1, num_bytes) if match[2] else num_bytes)
