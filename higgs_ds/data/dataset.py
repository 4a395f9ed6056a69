"""Samples with their cached codes, made into batches as they are asked for."""

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
    """Some rows of an index, whose clips are all in the cache."""

    index: Index
    rows: np.ndarray
    coder: Coder

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return self.index.num_tokens[self.rows].tolist()

    def batches(self, micro_batches: Sequence[Sequence[int]]) -> list[Batch]:
        """Several micro-batches, in memory that a GPU can read from where there is one."""
        batches = [self.batch(indices) for indices in micro_batches]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def batch(self, indices: Sequence[int]) -> Batch:
        """One micro-batch; no indices give one without targets."""
        hearing = self.coder.hearing
        num_mel_bins = hearing.num_mel_bins if hearing else None
        return collate([self.encoded(i) for i in indices], self.coder.stream, self.coder.pad_id, num_mel_bins)

    def sample(self, index: int) -> Sample:
        """A conversation, whose clips are named by its source alone."""
        return self.index.sample(int(self.rows[index]))[0]

    def encoded(self, index: int) -> EncodedSample:
        """A sample as ids and codes. Raises InputError where its codes have gone from the cache."""
        sample, clips = self.index.sample(int(self.rows[index]))
        cache, stream, hearing = self.coder.cache, self.coder.stream, self.coder.hearing
        codes: list[torch.Tensor] = []
        stretches: list[list[Stretch]] = []
        heard: list[MelFeatures] = []
        for clip in clips:
            cached = cache.load(clip.key, stream.num_codebooks)
            if cached is None:
                cache.drop(clip.key)  # so that the next start makes them again
                raise _missing_from_cache(sample, "codes", cache.path(clip.key))
            whole = cached.codes.long()
            if hearing is None or not clip.num_outputs:
                codes.append(whole)
                stretches.append([])
                continue
            features = hearing.load(clip.key)
            if features is None:
                hearing.drop(clip.key)
                raise _missing_from_cache(sample, "features", hearing.path(clip.key))
            codes += whole.split(hearing.frames_per_stretch, dim=1)
            stretches.append(hearing.stretches(clip.num_frames, clip.num_outputs))
            heard += features
        prompt = prompt_of(sample, [clip.num_frames for clip in clips], self.coder.tokenizer, stream, stretches)
        return EncodedSample(prompt, codes, heard)

    def sources(self, indices: Sequence[int]) -> list[str]:
        """Where samples come from: file and line."""
        return self.index.sources(self.rows[list(indices)])

    def digest(self) -> str:
        """Identity of the data: what is said, by whom, to which audio, whatever the files are called."""
        return hashlib.sha256(self.index.digests()[self.rows].tobytes()).hexdigest()


def _missing_from_cache(sample: Sample, what: str, path: Path) -> InputError:
    return InputError(
        f"{sample.source}: the {what} of its audio have gone from {path}, or are damaged; start again, with --resume "
        "auto, and they will be made again"
    )
