"""Codec codes of clips, kept on disk: each clip is encoded once, whatever the number of epochs, runs and ranks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from higgs_ds.common.files import replaced_file, saving, sha256_of
from higgs_ds.data.audio import RESAMPLING
from higgs_ds.data.sample import AudioClip

KEY_BYTES = 32
HEADER_BYTES = 1024  # what a file of codes holds beside them, at most


@dataclass(frozen=True)
class CachedCodes:
    """What the cache holds of a clip: codes (C, F), int16, and the share of its samples at full scale."""

    codes: torch.Tensor
    clipped: float


class CodeCache:
    """One small file per clip, named by the clip's content, its stretch, the resampling and the codec.

    Safe against several processes that store the same clip, and against being killed. A file that is damaged, or that
    belongs to another key, counts as not there.
    """

    def __init__(self, folder: Path, codec_digest: str) -> None:
        self.folder = folder / "codes"
        self.codec_digest = codec_digest

    def key(self, clip: AudioClip) -> str:
        """Name of a clip's codes, in hexadecimal. Raises OSError where the audio file cannot be read."""
        content = _content_of_file(clip.path, *_stamp(clip.path)) if clip.data is None else _sha256(clip.data)
        identity = [content, clip.offset_s, clip.duration_s, RESAMPLING, self.codec_digest]
        return _sha256(json.dumps(identity, sort_keys=True).encode())

    def load(self, key: str, num_codebooks: int) -> CachedCodes | None:
        """A clip's codes, or None where they are not there."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                metadata = file.metadata() or {}
                codes = file.get_tensor("codes")
                if metadata.get("key") != key or codes.ndim != 2 or len(codes) != num_codebooks:
                    return None
                return CachedCodes(codes, float(metadata["clipped"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def looks_complete(self, key: str, num_frames: int, num_codebooks: int) -> bool:
        """Whether there is a file of the right size; cheaper than to read it."""
        try:
            size = self.path(key).stat().st_size
        except OSError:
            return False
        return 128 < size - 2 * num_codebooks * num_frames < HEADER_BYTES

    def store(self, key: str, cached: CachedCodes) -> None:
        """Keep codes (C, F). Raises SaveError."""
        with saving(self.path(key)), replaced_file(self.path(key)) as temporary:
            metadata = {"key": key, "clipped": repr(cached.clipped)}
            save_file({"codes": cached.codes.to(torch.int16).contiguous()}, temporary, metadata)

    def drop(self, key: str) -> None:
        """Forget a clip, so that it will be encoded again."""
        self.path(key).unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=4096)  # a recording may hold thousands of clips, one behind the other
def _content_of_file(path: Path, size: int, mtime_ns: int) -> str:
    return sha256_of(path)
