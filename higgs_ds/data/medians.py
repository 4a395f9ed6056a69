"""Medians of groups of samples: of a speaker, of a language, or of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from higgs_ds.data.index import Index
from higgs_ds.data.spoken_text import primary_language


@dataclass(frozen=True)
class Groups:
    """For each row the numbers of its groups, from the narrowest on; -1 for no group. Each with what it is called."""

    by_language: list[tuple[str, np.ndarray]]
    by_speaker: list[tuple[str, np.ndarray]]


def groups_of(index: Index, speakers: np.ndarray) -> Groups:
    """Return the groups that speech is compared within, given the number of each row's speaker.

    A sample whose language has too few samples is not compared with other languages, which may be written in fewer
    characters.
    """
    numbers, labels = index.labels("language")
    merged = {name: number for number, name in enumerate(dict.fromkeys(map(primary_language, labels)))}
    of_label = np.array([*(merged[primary_language(label)] for label in labels), -1])
    languages = of_label[numbers]
    everything = np.zeros(len(speakers), np.int8)
    both = np.where(speakers >= 0, (languages + 1) * (int(speakers.max(initial=0)) + 1) + speakers, -1)
    unlabelled = -(languages >= 0).astype(np.int8)
    by_language = [
        ("of the speaker", both),
        ("of the language", languages),
        ("of all samples without a language" if (languages >= 0).any() else "of all samples", unlabelled),
    ]
    return Groups(by_language, [("of the speaker", speakers), ("of all samples", everything)])


@dataclass(frozen=True)
class Medians:
    """For each row the median of its narrowest group that is large enough, NaN for none; and which group that is."""

    values: np.ndarray
    level: np.ndarray
    names: Sequence[str]

    @classmethod
    def of(
        cls, values: np.ndarray, is_known: np.ndarray, groups: Sequence[tuple[str, np.ndarray]], min_count: int
    ) -> Medians:
        """Compute the medians of `values` (N,) where they are known."""
        medians, level = np.full(len(values), np.nan, np.float32), np.full(len(values), -1, np.int8)
        for number, (_, group) in enumerate(groups):
            is_left = np.isnan(medians) & is_known & (group >= 0)
            if is_left.any():
                found = _group_medians(values, is_known & (group >= 0), group, min_count)
                is_left &= ~np.isnan(found)
                medians[is_left], level[is_left] = found[is_left], number
        return cls(medians, level, [name for name, _ in groups])

    def of_what(self, row: int) -> str:
        return self.names[self.level[row]]


def rates_of(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return characters per second of speech, and which samples have any, given an array of the type TEXT."""
    has_words = (text["num_chars"] >= 0) & (text["speech_s"] > 0)
    return text["num_chars"].astype(np.float32) / np.where(has_words, text["speech_s"], 1), has_words


def _group_medians(values: np.ndarray, counts: np.ndarray, group: np.ndarray, min_count: int) -> np.ndarray:
    """Return for each row the median of the values in its group that count; NaN if they are fewer than `min_count`."""
    rows = np.flatnonzero(counts)
    medians = np.full(len(values), np.nan, np.float32)
    if not len(rows):
        return medians
    ordered = rows[np.lexsort((values[rows], group[rows]))]
    starts = np.concatenate([[0], np.flatnonzero(np.diff(group[ordered])) + 1])
    sizes = np.diff([*starts, len(ordered)])
    of_group = (values[ordered[starts + (sizes - 1) // 2]] + values[ordered[starts + sizes // 2]]) / 2
    medians[ordered] = np.repeat(np.where(sizes >= min_count, of_group, np.nan), sizes)
    return medians
