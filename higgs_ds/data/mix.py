"""--mix: how often an epoch has the samples of each manifest.

What an epoch has depends only on the seed, the numbers and the epoch, and so is the same for any number of ranks, any
accumulation, and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Mix:
    """The samples of each epoch. Those of all manifests are numbered in order, from 0.

    A manifest with the number 2.25 has all its samples twice in each epoch, and another quarter of them once more. For
    that share, epochs go round the manifest in one seeded order: over any four epochs in a row, each sample has been in
    it once, and in one epoch no more than once. Where the share of an epoch is not whole, sums over epochs are rounded.
    """

    counts: tuple[int, ...]  # samples of each manifest
    numbers: tuple[float, ...]  # of --mix
    seed: int

    def num_samples(self, epoch: int) -> list[int]:
        """Return how many samples of each manifest an epoch from 0 has, repetitions included."""
        return [stop - start for start, stop in self._turns(epoch)]

    def samples_in(self, epoch: int) -> list[int]:
        """Return the samples of an epoch, in no useful order; repeated ones are repeated."""
        found: list[int] = []
        first = 0
        for number, (count, turns) in enumerate(zip(self.counts, self._turns(epoch), strict=True)):
            order = np.argsort(np.random.PCG64([self.seed % 2**64, number]).random_raw(count), kind="stable")
            found += (first + order[np.arange(*turns) % count]).tolist()
            first += count
        return found

    def _turns(self, epoch: int) -> list[tuple[int, int]]:
        """Return the turns that an epoch takes of each manifest, repeated in its order without end: first, last + 1."""
        found = []
        for count, number in zip(self.counts, self.numbers, strict=True):
            whole, share = divmod(Fraction(repr(number)), 1)  # of the decimal number: 0.1 is exactly a tenth
            start, stop = (math.ceil(count * share * turn) for turn in (epoch, epoch + 1))
            found.append((start, stop + count * whole))
        return found


def mix_of(counts: Sequence[int], numbers: Sequence[float] | None, seed: int) -> Mix | None:
    """Return the mix of manifests with these numbers of samples; None if each epoch has every sample once."""
    if numbers is None or all(number == 1 for number in numbers):
        return None
    return Mix(tuple(counts), tuple(numbers), seed)
