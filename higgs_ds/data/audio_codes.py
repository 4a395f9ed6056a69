"""Codec codes of clips, kept on disk: each clip is encoded once, whatever the number of epochs, runs and ranks."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from higgs_ds.data.audio import RESAMPLING, AudioError, read_audio
from higgs_ds.data.codec import Codec
from higgs_ds.data.sample import AudioClip
from higgs_ds.files import replaced_file, sha256_of


def default_cache_dir() -> Path:
    """$HIGGS_DS_CACHE, or ~/.cache/higgs_ds."""
    return Path(os.environ.get("HIGGS_DS_CACHE") or Path.home() / ".cache" / "higgs_ds")


class CodeCache:
    """One small file per clip, named by the clip's content, its stretch, the resampling and the codec."""

    def __init__(self, folder: Path, codec_digest: str) -> None:
        self.folder = folder / "codes"
        self.codec_digest = codec_digest
        self._content: dict[Path, str] = {}

    def key(self, clip: AudioClip) -> str:
        """Name of a clip's codes. Raises OSError where the audio file cannot be read."""
        if clip.path not in self._content:
            self._content[clip.path] = sha256_of(clip.path)
        identity = [self._content[clip.path], clip.offset_s, clip.duration_s, RESAMPLING, self.codec_digest]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> torch.Tensor | None:
        """Codes (C, F), int64, or None where they are not there or the file is damaged."""
        try:
            return load_file(self._path(key))["codes"].long()
        except (FileNotFoundError, SafetensorError, KeyError):
            return None

    def store(self, key: str, codes: torch.Tensor) -> None:
        """Keep codes (C, F). Safe against other processes that store the same clip, and against being killed."""
        with replaced_file(self._path(key)) as temporary:
            save_file({"codes": codes.to(torch.int16).contiguous()}, temporary)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def find_keys(
    cache: CodeCache, clips: Iterable[tuple[AudioClip, str]], sample_rate: int, min_samples: int
) -> tuple[dict[AudioClip, str], list[AudioClip], list[str]]:
    """Name every clip's codes, and decode those that are not cached once, to see that it can be done.

    Args:
        clips: each clip with the FILE:LINE that asks for it.
        sample_rate: the codec's, in Hz; min_samples: its shortest input.

    Returns the key of each good clip, the clips to be encoded, and the problems.
    """
    keys: dict[AudioClip, str] = {}
    missing: list[AudioClip] = []
    problems = []
    for clip, source in clips:
        if clip in keys:
            continue
        try:
            key = cache.key(clip) if clip.path.is_file() else ""
            if not key or cache.load(key) is None:
                num_samples = len(read_audio(clip, sample_rate))
                if num_samples < min_samples:
                    raise AudioError(
                        f"lasts {num_samples / sample_rate:.3f} s, "
                        f"shorter than one frame of the codec ({min_samples / sample_rate:.3f} s)"
                    )
                missing.append(clip)
            keys[clip] = key
        except (AudioError, OSError) as error:
            problems.append(f"{source}: {clip.path}: {error}")
    return keys, missing, problems


def encode_clips(cache: CodeCache, codec: Codec, clips: Sequence[AudioClip], keys: dict[AudioClip, str]) -> None:
    """Encode clips one by one into the cache."""
    for clip in clips:
        cache.store(keys[clip], codec.encode(read_audio(clip, codec.sample_rate)))
