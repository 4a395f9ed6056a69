"""The micro-batches that are planned for: of a run's own samples, or of samples of an assumed length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from higgs_ds.options.fields import SFT
from higgs_ds.options.train import TrainOptions

DEFAULT_LENGTH = 2048  # positions per sample, if neither data nor an option says how long samples are


@dataclass(frozen=True, eq=False)
class SampleLengths:
    """The most tokens that each sample of a run has in any epoch, in ascending order (N,).

    `repeats`: how often one epoch may have a sample; see --mix.
    """

    tokens: np.ndarray
    repeats: int = 1

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], options: TrainOptions) -> SampleLengths:
        """Return the lengths of the samples of several selections."""
        return cls(np.sort(np.concatenate(tokens)), math.ceil(max(options.data.mix or (1,))))

    def up_to(self, limit: int | None) -> np.ndarray:
        """Return the lengths without those above a limit."""
        return self.tokens if limit is None else self.tokens[: np.searchsorted(self.tokens, limit, side="right")]


def batch_shapes(options: TrainOptions, lengths: SampleLengths | None) -> list[tuple[int, int]]:
    """Return the shapes (samples, positions of each) of which the one that needs the most memory is the largest.

    With --max_tokens_per_batch, that is a micro-batch with the longest sample, or one that fills the limit better with
    shorter samples.
    """
    limit, max_seq_len = options.optim.max_tokens_per_batch, options.data.max_seq_len
    if options.objective.is_dpo and limit is not None:
        single = options.replace(max_tokens_per_batch=limit // 2, objective=SFT)
        return [(2 * pairs, length) for pairs, length in batch_shapes(single, lengths)]
    if lengths is None:
        length = max_seq_len or limit or DEFAULT_LENGTH
        return [(options.rows_per_batch, length)] if limit is None else [_filled(limit, min(length, limit))]
    tokens = lengths.up_to(max_seq_len)
    longest = int(tokens[-1])
    if limit is None:
        return [(options.rows_per_batch, longest)]
    values, first = np.unique(tokens[::-1], return_index=True)
    # Samples of one micro-batch are no longer than its longest, and each of them is in an epoch `repeats` times.
    counts = np.minimum(limit // values, (len(tokens) - first) * lengths.repeats)
    fullest = int(np.argmax(counts * values))
    return list(dict.fromkeys([_filled(limit, longest), (int(counts[fullest]), int(values[fullest]))]))


def _filled(limit: int, length: int) -> tuple[int, int]:
    return max(1, limit // length), length
