"""Samples with their cached codes, made into batches as they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from higgs_ds.data.audio_codes import CodeCache
from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.data.delay_pattern import AudioStream
from higgs_ds.data.prompt import Tokenizer, prompt_of
from higgs_ds.data.sample import AudioClip, Sample


@dataclass(frozen=True)
class Dataset:
    """Checked samples whose clips are all in the cache under `keys`."""

    samples: Sequence[Sample]
    keys: dict[AudioClip, str]
    cache: CodeCache
    tokenizer: Tokenizer
    stream: AudioStream
    pad_id: int

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """One micro-batch; no indices give one without targets."""
        return collate([self.encoded(i) for i in indices], self.stream, self.pad_id)

    def encoded(self, index: int) -> EncodedSample:
        sample = self.samples[index]
        codes = [self._codes(clip) for clip in sample.clips]
        return EncodedSample(prompt_of(sample, [c.shape[1] for c in codes], self.tokenizer, self.stream), codes)

    def digest(self) -> str:
        """Identity of the data: what is said, by whom, to which audio, whatever the files are called."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for message in sample.messages:
                parts = [part if isinstance(part, str) else self.keys[part] for part in message.parts]
                digest.update(repr((message.role, message.recipient, parts)).encode())
            digest.update(repr(sample.start_index).encode())
        return digest.hexdigest()

    def _codes(self, clip: AudioClip) -> torch.Tensor:
        codes = self.cache.load(self.keys[clip])
        if codes is None:
            raise FileNotFoundError(f"the codes of {clip.path} have gone from {self.cache.folder} while training")
        return codes
