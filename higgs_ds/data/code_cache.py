"""Cache codec codes on disk: each clip is encoded once, whatever the number of epochs, runs and ranks."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from higgs_ds.common.files import replaced_file, saving, sha256_of
from higgs_ds.data.audio import RESAMPLING, AudioError
from higgs_ds.data.quality import ClipQuality, decoded
from higgs_ds.model.sample import AudioClip

if TYPE_CHECKING:
    import torch

KEY_BYTES = 32
HEADER_BYTES = 1024  # upper limit of what a file contains besides the codes


@dataclass(frozen=True)
class CachedCodes:
    """Cached data of a clip: codes (C, F), int16, and its measurements, which earlier versions did not store."""

    codes: torch.Tensor
    quality: ClipQuality | None = None


class CodeCache:
    """One small file per clip, named after the clip's content, offset and duration, what is trimmed, the resampling
    and the codec.

    Several processes may store the same clip at the same time, and may be killed at any time. A file that is damaged,
    or that belongs to another key, counts as missing.
    """

    def __init__(self, folder: Path, codec_digest: str) -> None:
        self.folder = folder / "codes"
        self.codec_digest = codec_digest

    def key(self, clip: AudioClip, trimmed: Sequence[float] = ()) -> str:
        """Return the hexadecimal key of a clip's codes.

        Args:
            trimmed: how the clip's ends are trimmed; empty if they are not.

        Raises:
            OSError: the audio file cannot be read.
            AudioError: it is not a file.
        """
        content = _content_of_file(clip.path, *_stamp(clip.path)) if clip.data is None else _sha256(clip.data)
        identity = [content, clip.offset_s, clip.duration_s, RESAMPLING, self.codec_digest, *trimmed]
        return _sha256(json.dumps(identity, sort_keys=True).encode())

    def load(self, key: str, num_codebooks: int) -> CachedCodes | None:
        """Return a clip's codes, or None if they are not cached."""
        return self._read(key, num_codebooks)

    def facts(self, key: str, num_codebooks: int) -> tuple[int, ClipQuality | None] | None:
        """Return a clip's number of frames and its measurements, or None if it is not cached.

        A file is accepted that `load` accepts, but read without torch and safetensors, which takes a fifth of the time.
        """
        try:
            with open(self.path(key), "rb", buffering=0) as file:
                content = file.read()
            start = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:start])
            entry, metadata = header["codes"], header["__metadata__"]
            num_rows, num_frames = entry["shape"]
            num_bytes = 2 * num_rows * num_frames
            is_whole = entry["dtype"] == "I16" and entry["data_offsets"] == [0, num_bytes]
            if not is_whole or len(content) != start + num_bytes:
                return None
            if metadata["key"] != key or num_rows != num_codebooks:
                return None
            return num_frames, decoded(metadata["quality"]) if "quality" in metadata else None
        except (OSError, KeyError, ValueError, TypeError):
            return None

    def _read(self, key: str, num_codebooks: int) -> CachedCodes | None:
        try:
            with safe_open(self.path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                codes = file.get_tensor("codes")
                if metadata.get("key") != key or codes.ndim != 2 or len(codes) != num_codebooks:
                    return None
                return CachedCodes(codes, decoded(metadata["quality"]) if "quality" in metadata else None)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def looks_complete(self, key: str, num_frames: int, num_codebooks: int) -> bool:
        """Return whether a file of the right size exists. Cheaper than reading it."""
        try:
            size = os.stat(self.path(key)).st_size
        except OSError:
            return False
        return 128 < size - 2 * num_codebooks * num_frames < HEADER_BYTES

    def store(self, key: str, cached: CachedCodes) -> None:
        """Store codes (C, F). Raises SaveError."""
        import torch
        from safetensors.torch import save_file

        with saving(self.path(key)), replaced_file(self.path(key)) as temporary:
            metadata = {"key": key} | ({"quality": cached.quality.encoded()} if cached.quality else {})
            save_file({"codes": cached.codes.to(torch.int16).contiguous()}, temporary, metadata)

    def drop(self, key: str) -> None:
        """Delete a clip's codes, so that it is encoded again."""
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe, for instance, might never end
        raise AudioError("is not a file")
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4096)  # one recording may contain thousands of clips
def _content_of_file(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)
