"""Samples with their cached codes, collated into batches on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from higgs_ds.common.errors import InputError
from higgs_ds.data.coder import Coder
from higgs_ds.data.collate import Batch, EncodedSample, collate
from higgs_ds.data.index_writer import CheckedClip
from higgs_ds.data.joined_index import AnyIndex
from higgs_ds.data.mel_features import MelFeatures
from higgs_ds.data.mix import Mix
from higgs_ds.data.reference_choice import References
from higgs_ds.data.references import pair_of, with_reference
from higgs_ds.model.prompt import Stretch
from higgs_ds.model.sample import Sample


@dataclass(frozen=True)
class Dataset:
    """A selection of rows of an index. All their clips are in the cache.

    `references`: where they are left out or drawn. What samples have then depends on the epoch; without an epoch, it is
    a fixed choice that leaves none out.

    `manifests`: where there are several, the samples of each, by a short name; some may have none.

    `mix`: which samples each epoch has, where that is not each of them once.
    """

    index: AnyIndex
    rows: np.ndarray
    coder: Coder
    references: References | None = None
    manifests: Mapping[str, range] = field(default_factory=dict)
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return self.lengths_in(None)

    @property
    def group_lengths(self) -> list[int]:
        """Number of tokens of what a sampler counts: of each sample."""
        return self.lengths

    def lengths_in(self, epoch: int | None) -> list[int]:
        """Return the number of tokens of each sample in an epoch, from 0."""
        if self.references is not None:
            return self.references.in_epoch(epoch).lengths.tolist()
        return self.index.num_tokens[self.rows].tolist()

    @property
    def longest_lengths(self) -> np.ndarray:
        """Upper limit of each sample's tokens in any epoch (N,)."""
        return self.index.num_tokens[self.rows] if self.references is None else self.references.longest

    @property
    def longest(self) -> int:
        """Upper limit of the tokens of a sample in any epoch; 0 without samples."""
        return int(self.longest_lengths.max(initial=0))

    def samples_in(self, epoch: int) -> Sequence[int]:
        """Return the samples of an epoch, from 0, in no useful order."""
        return self.mix.samples_in(epoch) if self.mix is not None else range(len(self))

    def alternating(self) -> Iterator[int]:
        """Yield all samples, those of several manifests by turns."""
        for indices in zip_longest(*(self.manifests.values() or [range(len(self))])):
            yield from (index for index in indices if index is not None)

    def batches(self, micro_batches: Sequence[Sequence[int]], epoch: int | None = None) -> list[Batch]:
        """Return several micro-batches of an epoch, in page-locked memory if there is a GPU."""
        batches = [self.batch(indices, epoch) for indices in micro_batches]
        return [batch.pinned() for batch in batches] if torch.cuda.is_available() else batches

    def batch(self, indices: Sequence[int], epoch: int | None = None) -> Batch:
        """Return one micro-batch. Without indices, it has no targets."""
        hearing = self.coder.hearing
        num_mel_bins = hearing.num_mel_bins if hearing else None
        return collate([self.encoded(i, epoch) for i in indices], self.coder.stream, self.coder.pad_id, num_mel_bins)

    def sample(self, index: int) -> Sample:
        """Return a conversation. The path of each of its clips is just the sample's source."""
        return self._sample(index, None)[0]

    def _sample(self, index: int, epoch: int | None) -> tuple[Sample, list[CheckedClip]]:
        row = int(self.rows[index])
        if self.references is None:
            return self.index.sample(row)
        chosen = self.references.in_epoch(epoch)
        sample, clips = self.index.sample(row, without_reference=bool(chosen.left_out[index]))
        if chosen.rows[index] < 0:
            return sample, clips
        other, clips_of_other = self.index.sample(int(chosen.rows[index]))
        pair = pair_of(other)
        assert pair is not None
        return with_reference(sample, pair), [clips_of_other[-1], *clips]

    def encoded(self, index: int, epoch: int | None = None) -> EncodedSample:
        """Return a sample as token ids and codes. Raises InputError if its codes are missing from the cache."""
        sample, clips = self._sample(index, epoch)
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
        num_frames = [clip.num_frames for clip in clips]
        prompt = self.coder.family.prompt_of(sample, num_frames, self.coder.tokenizer, stream, stretches)
        return EncodedSample(prompt, codes, heard)

    def sources(self, indices: Sequence[int]) -> list[str]:
        """Return where samples come from: file and line."""
        return self.index.sources(self.rows[list(indices)])

    def digest(self) -> str | list[str]:
        """Return the identity of the data: texts, roles and audio content, independent of the names of files.

        Of several manifests, it is a list: the identity of each, then that of the references, if they depend on the
        epoch.
        """
        digests = self.index.digests()[self.rows]
        of_each = [
            hashlib.sha256(digests[samples.start : samples.stop].tobytes())
            for samples in self.manifests.values() or [range(len(self))]
        ]
        if self.references is not None:
            if self.manifests:
                of_each.append(hashlib.sha256())
            of_each[-1].update(self.references.digest())
        found = [digest.hexdigest() for digest in of_each]
        return found if self.manifests else found[0]


def _missing_from_cache(sample: Sample, what: str, path: Path) -> InputError:
    return InputError(
        f"{sample.source}: the {what} of its audio in {path} are missing or damaged; start again with --resume auto to "
        "compute them again"
    )
