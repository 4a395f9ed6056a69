"""Samples with their cached codes, made into batches as they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from higgs_ds.data.coder import Coder
from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.data.index import Index
from higgs_ds.data.prompt import prompt_of
from higgs_ds.errors import InputError


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
        return collate([self.encoded(i) for i in indices], self.coder.stream, self.coder.pad_id)

    def encoded(self, index: int) -> EncodedSample:
        """A sample as ids and codes. Raises InputError where its codes have gone from the cache."""
        sample, keys, num_frames = self.index.sample(int(self.rows[index]))
        cache, stream = self.coder.cache, self.coder.stream
        codes = []
        for key in keys:
            cached = cache.load(key, stream.num_codebooks)
            if cached is None:
                cache.drop(key)  # so that the next start makes them again
                raise InputError(
                    f"{sample.source}: the codes of its audio have gone from {cache.path(key)}, or are damaged; "
                    "start again, with --resume auto, and they will be made again"
                )
            codes.append(cached.codes.long())
        return EncodedSample(prompt_of(sample, num_frames, self.coder.tokenizer, stream), codes)

    def sources(self, indices: Sequence[int]) -> list[str]:
        """Where samples come from: file and line."""
        return self.index.sources(self.rows[list(indices)])

    def digest(self) -> str:
        """Identity of the data: what is said, by whom, to which audio, whatever the files are called."""
        return hashlib.sha256(self.index.digests()[self.rows].tobytes()).hexdigest()
