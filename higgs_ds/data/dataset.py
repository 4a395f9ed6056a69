"""Samples with their cached codes, collated into batches on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from higgs_ds.common.errors import InputError
from higgs_ds.data.coder import Coder
from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.data.index import Index
from higgs_ds.data.mel_features import MelFeatures
from higgs_ds.data.prompt import Stretch, prompt_of
from higgs_ds.data.sample import Sample


@dataclass(frozen=True)
class Dataset:
    """A selection of rows of an index. All their clips are in the cache."""

    index: Index
    rows: np.ndarray
    coder: Coder

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return self.index.num_tokens[self.rows].tolist()

    def batches(self, micro_batches: Sequence[Sequence[int]]) -> list[Batch]:
        """Return several micro-batches, in page-locked memory if there is a GPU."""
        batches = [self.batch(indices) for indices in micro_batches]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return one micro-batch. Without indices, it has no targets."""
        hearing = self.coder.hearing
        num_mel_bins = hearing.num_mel_bins if hearing else None
        return collate([self.encoded(i) for i in indices], self.coder.stream, self.coder.pad_id, num_mel_bins)

    def sample(self, index: int) -> Sample:
        """Return a conversation. The path of each of its clips is just the sample's source."""
        return self.index.sample(int(self.rows[index]))[0]

    def encoded(self, index: int) -> EncodedSample:
        """Return a sample as token ids and codes. Raises InputError if its codes are missing from the cache."""
        sample, clips = self.index.sample(int(self.rows[index]))
        cache, stream, hearing = self.coder.cache, self.coder.stream, self.coder.hearing
        codes: list[torch.Tensor] = []
        stretches: list[list[Stretch]] = []
        heard: list[MelFeatures] = []
        for clip in clips:
            cached = cache.load(clip.key, stream.num_codebooks)
            if cached is None:
                cache.drop(clip.key)  # so that the next run computes them again
                raise _missing_from_cache(sample, "codes", cache.path(clip.key))
            clip_codes = cached.codes.long()
            if hearing is None or not clip.num_outputs:
                codes.append(clip_codes)
                stretches.append([])
                continue
            features = hearing.load(clip.key)
            if features is None:
                hearing.drop(clip.key)
                raise _missing_from_cache(sample, "features", hearing.path(clip.key))
            codes += clip_codes.split(hearing.frames_per_stretch, dim=1)
            stretches.append(hearing.stretches(clip.num_frames, clip.num_outputs))
            heard += features
        prompt = prompt_of(sample, [clip.num_frames for clip in clips], self.coder.tokenizer, stream, stretches)
        return EncodedSample(prompt, codes, heard)

    def sources(self, indices: Sequence[int]) -> list[str]:
        """Return where samples come from: file and line."""
        return self.index.sources(self.rows[list(indices)])

    def digest(self) -> str:
        """Return the identity of the data: texts, roles and audio content, independent of the names of files."""
        return hashlib.sha256(self.index.digests()[self.rows].tobytes()).hexdigest()


def _missing_from_cache(sample: Sample, what: str, path: Path) -> InputError:
    return InputError(
        f"{sample.source}: the {what} of its audio in {path} are missing or damaged; start again with --resume auto to "
        "compute them again"
    )
