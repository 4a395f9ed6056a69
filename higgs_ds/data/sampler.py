"""Which samples each rank takes at each optimizer step: seeded, without overlap, and resumable at any step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """The samples of one optimizer step: `micro_batches[m]` are this rank's in its m-th forward pass, maybe none.

    Every rank has the same number of micro-batches. The samples of a window do not depend on how they are spread over
    ranks and micro-batches, only on how many there are.
    """

    epoch: int
    index: int
    micro_batches: list[list[int]]


@dataclass(frozen=True)
class WindowSampler:
    """Cuts a shuffled epoch of `num_samples` into windows of micro_batch_size x gradient_accumulation_steps x ranks.

    The last window of an epoch is short where the numbers do not divide; no sample is dropped or repeated.
    """

    num_samples: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    world_size: int
    seed: int

    @property
    def window_size(self) -> int:
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.num_samples // self.window_size)

    def windows(self, first_step: int, last_step: int) -> Iterator[Window]:
        """The windows of the optimizer steps `first_step` (from 0) to before `last_step`, over as many epochs."""
        order: list[int] = []
        ordered_epoch = -1
        for step in range(first_step, last_step):
            epoch, index = divmod(step, self.windows_per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = self._order(epoch), epoch
            window = order[index * self.window_size : (index + 1) * self.window_size]
            yield Window(epoch, index, share_of_rank(window, self.micro_batch_size, self.rank, self.world_size))

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.num_samples))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order


def share_of_rank(items: Sequence[T], micro_batch_size: int, rank: int, world_size: int) -> list[list[T]]:
    """This rank's micro-batches of `items`: the same number on every rank, the last ones short or empty."""
    stride = micro_batch_size * world_size
    count = max(1, -(-len(items) // stride))
    starts = [m * stride + rank * micro_batch_size for m in range(count)]
    return [list(items[start : start + micro_batch_size]) for start in starts]


def split_validation(num_samples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to validate on: a seeded draw of `fraction`, at least one where there are two or more."""
    order = list(range(num_samples))
    random.Random(f"{seed}:split").shuffle(order)
    count = round(num_samples * fraction)
    if fraction > 0 and num_samples > 1:
        count = min(max(count, 1), num_samples - 1)
    return sorted(order[count:]), sorted(order[:count])
