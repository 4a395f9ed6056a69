"""The indexes of several manifests as one. Each manifest keeps its own on disk, and is checked on its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np

from higgs_ds.data.index import Index
from higgs_ds.data.index_writer import DIGEST_BYTES, CheckedClip
from higgs_ds.model.sample import Sample


class JoinedIndex:
    """Random access to the rows of several indexes: those of the first, then those of the second, and so on."""

    def __init__(self, parts: Sequence[Index]) -> None:
        self._parts = tuple(parts)
        self._bounds = np.cumsum([0, *map(len, parts)])
        self.num_tokens = np.concatenate([part.num_tokens for part in parts])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def _at(self, row: int) -> tuple[Index, int]:
        number = int(np.searchsorted(self._bounds, row, side="right")) - 1
        return self._parts[number], row - int(self._bounds[number])

    def sample(self, row: int, without_reference: bool = False) -> tuple[Sample, list[CheckedClip]]:
        part, own_row = self._at(row)
        return part.sample(own_row, without_reference)

    def sources(self, rows: Iterable[int]) -> list[str]:
        return [source for row in rows for part, own_row in [self._at(int(row))] for source in part.sources([own_row])]

    def labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a column of strings as `Index.labels` does; equal strings of two manifests are the same."""
        numbers: dict[str, int] = {}
        columns = []
        for part in self._parts:
            own, strings = part.labels(name)
            joined = [numbers.setdefault(string, len(numbers)) for string in strings]
            columns.append(np.array([*joined, -1], np.int32)[own])  # the last place is that of -1
        return np.concatenate(columns), list(numbers)

    def voices(self) -> np.ndarray:
        """Return the number of each row's speaker, -1 for none; equal names of two manifests are two speakers."""
        columns = [part.voices() for part in self._parts]
        firsts = np.cumsum([0, *(int(column.max(initial=-1)) + 1 for column in columns)])
        return np.concatenate(
            [np.where(column < 0, -1, column + first) for column, first in zip(columns, firsts[:-1], strict=True)]
        )

    def prompts(self) -> np.ndarray:
        return np.concatenate([part.prompts() for part in self._parts])

    def reference_column(self, name: str) -> np.ndarray:
        return np.concatenate([part.reference_column(name) for part in self._parts])

    def digests(self) -> np.ndarray:
        return np.concatenate([part.digests() for part in self._parts])

    def repeated_rows(self) -> np.ndarray:
        """Return the rows whose sample an earlier manifest has too."""
        numbers = np.repeat(np.arange(len(self._parts)), np.diff(self._bounds))
        _, first, same = np.unique(self.digests().view(f"S{DIGEST_BYTES}"), return_index=True, return_inverse=True)
        return np.flatnonzero(numbers[first][same] < numbers)

    def num_frames(self) -> np.ndarray:
        return np.concatenate([part.num_frames() for part in self._parts])


AnyIndex = Index | JoinedIndex


def join(indexes: Sequence[Index]) -> AnyIndex:
    """Return the index of one manifest, or those of several as one."""
    return indexes[0] if len(indexes) == 1 else JoinedIndex(indexes)


def consecutive(counts: Iterable[int]) -> list[range]:
    """Return the numbers of the items of several lists, one after another, from 0."""
    return [range(*bounds) for bounds in pairwise([0, *accumulate(counts)])]
