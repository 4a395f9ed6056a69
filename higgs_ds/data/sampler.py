"""Assign samples to ranks and optimizer steps: seeded, sorted by length, without overlap, resumable at any step."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from higgs_ds.data.mix import Mix

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """The samples of one optimizer step: `micro_batches[m]` are this rank's in its m-th forward pass, possibly none.

    Every rank has the same number of micro-batches. `epoch` is the number of epochs that are done after this step, and
    `epoch_number` that of the epoch it belongs to, from 0.
    """

    epoch: float
    micro_batches: list[list[int]]
    epoch_number: int


@dataclass(frozen=True)
class WindowSampler:
    """Divides each shuffled epoch into windows of samples of about the same length, one per optimizer step.

    An epoch is shuffled and cut into at least four buckets of up to `bucket_size` samples. Each bucket is sorted by
    length and cut into batches, and these are shuffled. No sample is dropped, and without a `mix` none is repeated;
    the last window of an epoch may be short.

    With a fixed batch size, a window has micro_batch_size x gradient_accumulation_steps x ranks samples, and depends
    only on this product. With `max_tokens`, a micro-batch has as many samples as fit into that many positions including
    padding, and a window has gradient_accumulation_steps x ranks micro-batches and depends only on this product.
    """

    lengths: Sequence[int]  # tokens of each sample; only their number matters with `lengths_in`
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    bucket_size: int = 1
    max_tokens: int | None = None
    lengths_in: Callable[[int], Sequence[int]] | None = None  # the same for each epoch, if they differ
    mix: Mix | None = None  # which samples each epoch has, if not each of them once
    group_size: int = 1  # with 2, everything above counts pairs; pair i has the samples 2 i and 2 i + 1

    @property
    def window_size(self) -> int:
        """Number of samples of a window or, with `max_tokens`, of micro-batches."""
        micro_batches = self.gradient_accumulation_steps * self.world_size
        return micro_batches if self.max_tokens else micro_batches * self.micro_batch_size

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """Yield the windows of steps `first_step` (from 0) to `last_step` - 1, over as many epochs as needed."""
        step, epoch = 0, 0
        while step < last_step:
            epoch_windows = self.micro_batches(epoch)
            for index, window in enumerate(epoch_windows, start=1):
                if first_step <= step < last_step:
                    mine = [self._samples_of(groups) for groups in window[self.rank :: self.world_size]]
                    yield Window(epoch + index / len(epoch_windows), mine, epoch)
                step += 1
            epoch += 1

    def _samples_of(self, groups: list[int]) -> list[int]:
        size = self.group_size
        return [size * group + place for group in groups for place in range(size)] if size > 1 else groups

    def num_steps(self, epochs: int) -> int:
        """Return the optimizer steps of `epochs` epochs. With `max_tokens` or a `mix`, epochs differ a little."""
        if not self.max_tokens:
            sizes = [sum(self.mix.num_samples(n)) if self.mix else len(self.lengths) for n in range(epochs)]
            return sum(-(-size // self.window_size) for size in sizes)
        return sum(len(self.micro_batches(epoch)) for epoch in range(epochs))

    def padding(self) -> float:
        """Return the fraction of positions that are padding, over all micro-batches of the first epoch."""
        used = padded = 0
        lengths_of = self._lengths(0)
        for window in self.micro_batches(0):
            for indices in filter(None, window):
                lengths = [lengths_of[i] for i in indices]
                used += sum(lengths)
                padded += len(lengths) * max(lengths)
        return 1 - used / padded if padded else 0.0

    def micro_batches(self, epoch: int) -> list[list[list[int]]]:
        """Return all ranks' micro-batches of each window of an epoch: a multiple of `world_size`, some may be empty."""
        rng = random.Random(f"{self.seed}:{epoch}")
        lengths = self._lengths(epoch)
        order = self.mix.samples_in(epoch) if self.mix else list(range(len(self.lengths)))
        if not order:
            return []  # a small share of few samples
        rng.shuffle(order)
        # If the whole epoch were sorted at once, the same samples would share a batch in every epoch.
        bucket_size = min(self.bucket_size, -(-len(order) // 4))
        if self.max_tokens:
            packed = [
                batch for bucket in self._buckets(order, bucket_size, lengths) for batch in self._pack(bucket, lengths)
            ]
            rng.shuffle(packed)
            return [self._fill(window) for window in _chunks(packed, self.window_size)]
        per_bucket = -(-bucket_size // self.window_size)
        buckets = self._buckets(order, per_bucket * self.window_size, lengths)
        windows = [window for bucket in buckets for window in _chunks(bucket, self.window_size)]
        num_full = len(order) // self.window_size  # only the last window may be short; it stays last
        head = windows[:num_full]
        rng.shuffle(head)
        return [self._fill(_chunks(window, self.micro_batch_size)) for window in head + windows[num_full:]]

    def _lengths(self, epoch: int) -> Sequence[int]:
        return self.lengths if self.lengths_in is None else self.lengths_in(epoch)

    def _buckets(self, order: list[int], size: int, lengths: Sequence[int]) -> list[list[int]]:
        """Cut a shuffled order into buckets, each sorted by length. With a `bucket_size` of 1, leave it unchanged."""
        if self.bucket_size == 1:
            return [order]
        return [sorted(bucket, key=lengths.__getitem__) for bucket in _chunks(order, size)]

    def _pack(self, bucket: list[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield batches of consecutive samples that fit into `max_tokens` when padded to the longest."""
        assert self.max_tokens is not None
        batch: list[int] = []
        longest = 0
        for index in bucket:
            longest = max(longest, lengths[index])
            if batch and (len(batch) + 1) * longest > self.max_tokens:
                yield batch
                batch, longest = [], lengths[index]
            batch.append(index)
        if batch:
            yield batch

    def _fill(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """Append empty micro-batches, so that every rank has the same number of forward passes."""
        return micro_batches + [[]] * (-len(micro_batches) % self.world_size)


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def share_of_rank(items: Sequence[T], micro_batch_size: int, rank: int, world_size: int) -> list[list[T]]:
    """Return this rank's micro-batches of `items`: the same number on every rank, the last ones short or empty."""
    stride = micro_batch_size * world_size
    count = max(1, -(-len(items) // stride))
    starts = [m * stride + rank * micro_batch_size for m in range(count)]
    return [list(items[start : start + micro_batch_size]) for start in starts]


def split_validation(groups: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of training and validation samples: a seeded draw of whole groups, about `fraction` of all.

    At least one group is held out if there are two or more, and at least one remains for training.

    Args:
        groups: the group of each sample, for instance the number of its speaker. Groups are not split.
    """
    group_of_sample, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)[1:]
    order = list(range(len(counts)))
    random.Random(f"{seed}:split").shuffle(order)
    wanted = len(group_of_sample) * fraction
    is_held_out = np.zeros(len(counts), dtype=bool)
    num_held_out = 0
    for group in order[1:] if fraction > 0 else []:
        if num_held_out and num_held_out + counts[group] / 2 > wanted:
            break
        is_held_out[group] = True
        num_held_out += counts[group]
    held_out = is_held_out[group_of_sample]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def split_speakers(manifests: Sequence[np.ndarray], fraction: float, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split each of several manifests as `split_validation` splits one; a speaker is held out of all or of none.

    Each manifest keeps a speaker for training, and gives its fraction as far as speakers of other manifests allow it.
    Manifests without common speakers are split as each would be alone.

    Args:
        manifests: the number of each sample's speaker, the same in all manifests.
    """
    drawn = []
    for speakers in manifests:
        names = np.unique(speakers)
        order = list(range(len(names)))
        random.Random(f"{seed}:split").shuffle(order)
        drawn.append(names[order].tolist())
    kept: set[int] = set()
    for order in sorted(drawn, key=len):
        if kept.isdisjoint(order):
            kept.add(order[0])
    held_out: set[int] = set()
    for speakers, order in zip(manifests, drawn, strict=True):
        num_held_out = int(np.isin(speakers, sorted(held_out)).sum())
        for speaker in order if fraction > 0 else []:
            if speaker in kept or speaker in held_out:
                continue
            count = int((speakers == speaker).sum())
            if num_held_out and num_held_out + count / 2 > len(speakers) * fraction:
                break
            held_out.add(speaker)
            num_held_out += count
    masks = [np.isin(speakers, sorted(held_out)) for speakers in manifests]
    return [(np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)) for is_held_out in masks]
