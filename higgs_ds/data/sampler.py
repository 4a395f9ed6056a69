"""Which samples each rank takes at each optimizer step: seeded, by length, without overlap, resumable at any step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """The samples of one optimizer step: `micro_batches[m]` are this rank's in its m-th forward pass, maybe none.

    Every rank has the same number of micro-batches. `epoch` is where the run stands after this step.
    """

    epoch: float
    micro_batches: list[list[int]]


@dataclass(frozen=True)
class WindowSampler:
    """Cuts each shuffled epoch into windows of samples of about the same length, one for each optimizer step.

    An epoch is shuffled, cut into at least four buckets of up to `bucket_size`, each bucket is sorted by length and cut
    into batches, and these are shuffled. No sample is dropped or repeated; the last window of an epoch may be short.

    With a fixed batch size, a window holds micro_batch_size x gradient_accumulation_steps x ranks samples, whatever
    the three are. With `max_tokens`, a micro-batch is as many samples as fit into that many positions with their
    padding, and a window is gradient_accumulation_steps x ranks micro-batches, whatever the two are.
    """

    lengths: Sequence[int]  # tokens of each sample
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    seed: int
    bucket_size: int = 1
    max_tokens: int | None = None

    @property
    def window_size(self) -> int:
        """Samples of a window, or, with `max_tokens`, its micro-batches."""
        micro_batches = self.gradient_accumulation_steps * self.world_size
        return micro_batches if self.max_tokens else micro_batches * self.micro_batch_size

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The windows of the optimizer steps `first_step` (from 0) to before `last_step`, over as many epochs."""
        step, epoch = 0, 0
        while step < last_step:
            of_epoch = self.micro_batches(epoch)
            for index, window in enumerate(of_epoch, start=1):
                if first_step <= step < last_step:
                    yield Window(epoch + index / len(of_epoch), window[self.rank :: self.world_size])
                step += 1
            epoch += 1

    def num_steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs. With `max_tokens` they differ a little from epoch to epoch."""
        if not self.max_tokens:
            return epochs * -(-len(self.lengths) // self.window_size)
        return sum(len(self.micro_batches(epoch)) for epoch in range(epochs))

    def padding(self) -> float:
        """Share of the positions that are padding, over all micro-batches of the first epoch."""
        used = padded = 0
        for window in self.micro_batches(0):
            for indices in filter(None, window):
                lengths = [self.lengths[i] for i in indices]
                used += sum(lengths)
                padded += len(lengths) * max(lengths)
        return 1 - used / padded if padded else 0.0

    def micro_batches(self, epoch: int) -> list[list[list[int]]]:
        """The micro-batches of all ranks, in each window of an epoch: a multiple of `world_size`, some maybe empty."""
        rng = random.Random(f"{self.seed}:{epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        # Were all of an epoch sorted at once, the same samples would meet in every epoch.
        bucket_size = min(self.bucket_size, -(-len(order) // 4))
        if self.max_tokens:
            packed = [batch for bucket in self._buckets(order, bucket_size) for batch in self._pack(bucket)]
            rng.shuffle(packed)
            return [self._fill(window) for window in _chunks(packed, self.window_size)]
        per_bucket = -(-bucket_size // self.window_size)
        buckets = self._buckets(order, per_bucket * self.window_size)
        windows = [window for bucket in buckets for window in _chunks(bucket, self.window_size)]
        whole = len(order) // self.window_size  # only the last window is short; it stays there
        head = windows[:whole]
        rng.shuffle(head)
        return [self._fill(_chunks(window, self.micro_batch_size)) for window in head + windows[whole:]]

    def _buckets(self, order: list[int], size: int) -> list[list[int]]:
        """Stretches of a shuffled order, each sorted by length; with a `bucket_size` of 1 the order as it is."""
        if self.bucket_size == 1:
            return [order]
        return [sorted(bucket, key=self.lengths.__getitem__) for bucket in _chunks(order, size)]

    def _pack(self, bucket: list[int]) -> Iterator[list[int]]:
        """As many samples in a row as fit into `max_tokens` once they are padded to the longest."""
        assert self.max_tokens is not None
        batch: list[int] = []
        longest = 0
        for index in bucket:
            longest = max(longest, self.lengths[index])
            if batch and (len(batch) + 1) * longest > self.max_tokens:
                yield batch
                batch, longest = [], self.lengths[index]
            batch.append(index)
        if batch:
            yield batch

    def _fill(self, micro_batches: list[list[int]]) -> list[list[int]]:
        """Give every rank as many forward passes as the others, if need be on no sample."""
        return micro_batches + [[]] * (-len(micro_batches) % self.world_size)


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def share_of_rank(items: Sequence[T], micro_batch_size: int, rank: int, world_size: int) -> list[list[T]]:
    """This rank's micro-batches of `items`: the same number on every rank, the last ones short or empty."""
    stride = micro_batch_size * world_size
    count = max(1, -(-len(items) // stride))
    starts = [m * stride + rank * micro_batch_size for m in range(count)]
    return [list(items[start : start + micro_batch_size]) for start in starts]


def split_validation(groups: Sequence[int] | np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of samples to train on and to validate on: a seeded draw of whole groups, about `fraction` of all.

    Args:
        groups: what each sample belongs to and may not be parted from, for instance the number of its speaker.

    At least one group is held out where there are two or more, and at least one is left to train on.
    """
    of_sample, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)[1:]
    order = list(range(len(counts)))
    random.Random(f"{seed}:split").shuffle(order)
    wanted = len(of_sample) * fraction
    is_held_out = np.zeros(len(counts), dtype=bool)
    taken = 0
    for group in order[1:] if fraction > 0 else []:
        if taken and taken + counts[group] / 2 > wanted:
            break
        is_held_out[group] = True
        taken += counts[group]
    held_out = is_held_out[of_sample]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
