"""Which reference each sample has in an epoch: its own, another clip of its speaker, or none.

Choices depend only on the seed, the epoch and the number of a sample, and so are the same for any number of ranks, any
accumulation, and after a resume. All values are arrays with one element for each sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from higgs_ds.common.words import counted
from higgs_ds.data.joined_index import AnyIndex
from higgs_ds.options.fields import RANDOM_REFERENCE
from higgs_ds.options.train import DataOptions

LONGEST = 2**31 - 1
PROBES = 64  # clips that are tried for all samples at once before those left over are searched one by one
DROPOUT, FIRST, STRIDE = range(3)  # what random numbers are for


@dataclass(frozen=True)
class EpochReferences:
    """The references of N samples in one epoch: the row of the index that is a random one, -1 for no random one (N,);
    whether the sample is without the reference that it could have (N,); tokens of the sample as it is then (N,)."""

    rows: np.ndarray
    left_out: np.ndarray
    lengths: np.ndarray


class References:
    """The references of a selection of an index's rows."""

    def __init__(self, index: AnyIndex, rows: np.ndarray, pool: np.ndarray, options: DataOptions, seed: int) -> None:
        """Prepare the choices.

        Args:
            rows: of the samples, (N,).
            pool: rows whose targets may be random references of these samples.
        """
        self._seed, self._dropout = seed, options.reference_dropout
        self._full = index.num_tokens[rows]
        self._plain = index.reference_column("plain_tokens")[rows]
        self._longer_form = lengths_of_forms(index, options)[rows]
        self._random = RandomReferences(index, rows, pool, options, seed) if options.has_random_references else None
        self._kept: dict[int | None, EpochReferences] = {}

    @property
    def longest(self) -> np.ndarray:
        """Upper limit of each sample's tokens in any epoch."""
        return self._longer_form if self._random is None else self._longer_form + self._random.longest

    def in_epoch(self, epoch: int | None) -> EpochReferences:
        """Return the choices of an epoch from 0; with None, a fixed choice that leaves none out, for validation."""
        kept = self._kept
        if epoch not in kept:  # batches are made ahead: the last and the next epoch are both in use
            kept = self._kept = {**dict(list(kept.items())[-2:]), epoch: self._choose(epoch)}
        return kept[epoch]

    def _choose(self, epoch: int | None) -> EpochReferences:
        has_own = self._plain > 0
        rows, added = np.full(len(self._full), -1), np.zeros_like(self._full)
        if self._random is not None:
            rows, added = self._random.in_epoch(epoch or 0)
        left_out = np.zeros(len(rows), bool)
        if epoch is not None and self._dropout:
            below = _draws(len(rows), self._seed, DROPOUT, epoch) >> np.uint64(11)
            left_out = (below * 2.0**-53 < self._dropout) & (has_own | (rows >= 0))
        rows[left_out] = -1
        lengths = np.where(left_out, np.where(has_own, self._plain, self._full), self._full + added)
        return EpochReferences(rows, left_out, lengths)

    def digest(self) -> bytes:
        """Return the identity of the choices of all epochs, apart from the options."""
        parts = [self._plain, *(self._random.identity if self._random else ())]
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).digest()

    def describe(self, with_dropout: bool = True, first_epoch: Sequence[int] | None = None) -> str:
        """Return how many samples have which reference, and why others have none.

        Args:
            first_epoch: the samples of that epoch, if they are not each sample once.
        """
        own = int((self._plain > 0).sum())
        random = int((self.in_epoch(None).rows >= 0).sum())
        none = len(self._full) - own - random
        reasons = {}
        if self._random is not None:
            lacking, unnamed = self._random.num_lacking, int((self._random.is_unnamed & (self._plain == 0)).sum())
            reasons = {
                "name no speaker": unnamed,
                "are more than one text and its clip": none - unnamed - lacking,
                "have no other clip of their speaker, with other words and short enough": lacking,
            }
        why = "; ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
        counts = {
            "get another clip of their speaker": random,
            "have their own": own,
            f"have none ({why})" if why else "have none": none,
        }
        found = ", ".join(_in_number(count, what) for what, count in counts.items() if count)
        if not self._dropout or not with_dropout:
            return found
        first = int(self.in_epoch(0).left_out[slice(None) if first_epoch is None else first_epoch].sum())
        return f"{found}; left out with probability {self._dropout:g}, of {counted(first, 'sample')} in the first epoch"


class RandomReferences:
    """For each sample the other clips of its speaker that fit, in a seeded order that repeats only after all of them.

    A speaker's clips are all of one manifest: names such as "0" may be of other speakers in another one.

    The clips of a speaker are sorted by length, so that those that fit beside a sample are the first ones. A sample
    goes round them in steps of a stride that has no divisor in common with their number. Clips with the sample's own
    words, content or time in its file, which might be its target, are passed over.
    """

    def __init__(self, index: AnyIndex, rows: np.ndarray, pool: np.ndarray, options: DataOptions, seed: int) -> None:
        speakers = index.voices().astype(np.int64)
        self._rows = rows
        self._added = index.reference_column("pair_tokens")
        self._columns = {name: index.reference_column(name) for name in ("words", "clip", "file", "start_s", "end_s")}
        pool = pool[(self._added[pool] > 0) & (speakers[pool] >= 0)]
        self._sorted = pool[np.lexsort((pool, self._added[pool], speakers[pool]))]
        keys = speakers << 32 | self._added  # in this order
        room = np.clip((options.max_seq_len or 2 * LONGEST) - index.num_tokens[rows].astype(np.int64), 0, LONGEST)
        self._first = np.searchsorted(keys[self._sorted], speakers[rows] << 32)
        stop = np.searchsorted(keys[self._sorted], speakers[rows] << 32 | room, side="right")
        places = np.full(len(index), -1)
        places[self._sorted] = np.arange(len(self._sorted))
        own = places[rows] - self._first
        self._own = np.where((own >= 0) & (places[rows] < stop), own, LONGEST)  # the place of the sample's own clip
        self.is_unnamed = speakers[rows] < 0
        takes = (index.reference_column("takes")[rows] > 0) & ~self.is_unnamed
        self._count = np.where(takes, stop - self._first - (self._own < LONGEST), 0)
        divisor = np.maximum(self._count, 1)
        self._start = (_draws(len(rows), seed, FIRST) % divisor.astype(np.uint64)).astype(np.int64)
        self._stride = (_draws(len(rows), seed, STRIDE) % divisor.astype(np.uint64)).astype(np.int64)
        while (shared := np.gcd(self._stride, divisor) > 1).any():
            self._stride += shared
        found, _ = self.in_epoch(0)
        self._count[found < 0] = 0  # nothing in other epochs either: each goes round all
        self.num_lacking = int((takes & (self._count == 0)).sum())

    @property
    def identity(self) -> tuple[np.ndarray, ...]:
        """Arrays that are equal for equal choices."""
        return self._sorted, self._first, self._count

    @property
    def longest(self) -> np.ndarray:
        """Upper limit of the tokens that a reference adds to each sample."""
        longest = self._count - 1 + (self._own < self._count)
        places = np.minimum(self._first + np.maximum(longest, 0), max(len(self._sorted) - 1, 0))
        return np.where(self._count > 0, self._added[self._sorted[places]], 0) if len(self._sorted) else 0 * self._count

    def in_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of each sample's reference, -1 for none, and the tokens that it adds."""
        chosen = np.full(len(self._rows), -1)
        left = np.flatnonzero(self._count)
        for probe in range(PROBES):
            candidates = self._candidates(left, epoch + probe)
            is_other = self._are_others(self._rows[left], candidates)
            chosen[left[is_other]] = candidates[is_other]
            left = left[~is_other]
        for sample in left.tolist():
            candidates = self._candidates(sample, epoch + np.arange(self._count[sample]))
            others = candidates[self._are_others(self._rows[sample], candidates)]
            chosen[sample] = others[0] if len(others) else -1
        return chosen, np.where(chosen >= 0, self._added[chosen], 0)

    def _candidates(self, samples: np.ndarray | int, turns: np.ndarray | int) -> np.ndarray:
        count = self._count[samples]
        places = (self._start[samples] + turns % count * self._stride[samples]) % count
        places += places >= self._own[samples]
        return self._sorted[self._first[samples] + places]

    def _are_others(self, rows: np.ndarray | int, others: np.ndarray) -> np.ndarray:
        columns = self._columns
        same = (columns["words"][rows] == columns["words"][others]) | (columns["clip"][rows] == columns["clip"][others])
        overlap = (columns["start_s"][rows] < columns["end_s"][others]) & (
            columns["start_s"][others] < columns["end_s"][rows]
        )
        return ~(same | (columns["file"][rows] == columns["file"][others]) & overlap)


def _draws(count: int, seed: int, *purpose: int) -> np.ndarray:
    """Return `count` random uint64, the same on every machine and with every version of NumPy."""
    return np.random.PCG64([seed % 2**64, *purpose]).random_raw(count)


def references_of(
    index: AnyIndex, rows: np.ndarray, pool: np.ndarray, options: DataOptions, seed: int
) -> References | None:
    """Return the references of samples if they depend on the epoch."""
    varies = options.has_random_references or options.reference_dropout
    return References(index, rows, pool, options, seed) if varies else None


def lengths_of_forms(index: AnyIndex, options: DataOptions) -> np.ndarray:
    """Return the tokens of each row: of the longer form of a sample, with or without its own reference, if it has two.

    A clip in the system turn may be shorter than the description that replaces it.
    """
    tokens = index.num_tokens
    return np.maximum(tokens, index.reference_column("plain_tokens")) if options.reference_dropout else tokens


def reference_problems(options: DataOptions, index: AnyIndex) -> list[str]:
    """Return why the references of a training manifest cannot be what the options ask for; empty if they can."""
    if options.has_random_references:
        rows = np.arange(len(index))
        references = References(index, rows, rows, options, seed=0)
        if not (references.in_epoch(None).rows >= 0).any():
            option = "--reference random" if options.reference == RANDOM_REFERENCE else "--speaker_prompt reference"
            return [
                f"{option}: no training sample can get another clip of its speaker: {references.describe()}; "
                "name speakers of two or more clips, or use --reference context"
            ]
    elif options.reference_dropout and not index.reference_column("plain_tokens").any():
        return [
            f"--reference_dropout {options.reference_dropout}: no training sample has a reference to leave out; remove "
            "the option, or let samples get references (--reference random)"
        ]
    return []


def _in_number(count: int, what: str) -> str:
    """Return "2 samples have none" or "1 sample has none"; `what` is a predicate in plural."""
    verb, rest = what.split(" ", 1)
    verb_of_one = {"have": "has", "get": "gets"}[verb]
    return f"{counted(count, 'sample')} {verb_of_one if count == 1 else verb} {rest}"
