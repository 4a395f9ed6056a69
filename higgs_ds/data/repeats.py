"""Find samples that contradict one another: one clip with two texts, or one text with two clips of a speaker."""

from __future__ import annotations

import math

import numpy as np

from higgs_ds.data.index import Index
from higgs_ds.data.spoken_text import BANDS, normalized, words_of

MIN_BYTES = 20  # of a text: "Yes." may be said many times
MAX_BYTES = 2**11 - 1  # longer texts count as this long where they are sorted
MULTIPLIERS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd, to mix bits
MAX_COMPARED = 50_000  # pairs of texts, a few seconds
READ_AT_ONCE = 512  # of them: each text maps the pages around it


def same_audio(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows whose audio is that of an earlier row with other words, and these earlier rows.

    Args:
        text: array of the type TEXT.
    """
    rows = np.flatnonzero(text["num_chars"] >= 0)
    order = rows[np.argsort(text["audio"][rows], kind="stable")]
    if not len(order):
        return order, order
    is_same = np.diff(text["audio"][order]) == 0
    in_group = np.append(is_same, False) | np.append(False, is_same)
    order, is_first = order[in_group], ~np.append(False, is_same)[in_group]
    first = order[is_first][np.cumsum(is_first) - 1]
    differs = text["words"][order] != text["words"][first]
    order, first = order[differs], first[differs]
    by_row = np.argsort(order)
    return order[by_row], first[by_row]


def like_texts(
    index: Index, text: np.ndarray, speakers: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return rows with a text like that of an earlier row of the same speaker, and other audio; these earlier rows; and
    how many pairs were left uncompared.

    Texts are alike if they are the same but for one place, up to a share `similarity` of the longer one, in letters and
    digits. Neighbours among texts that start or end alike are compared, MAX_COMPARED pairs of them at most.

    Args:
        text: array of the type TEXT.
        speakers: number of each row's speaker.
    """
    if math.isinf(similarity):
        return np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    same = _neighbours(text, speakers, text["words"].astype(np.uint64), 0, MAX_BYTES)
    same = same[:, text["words"][same[0]] == text["words"][same[1]]]
    likely = [np.zeros((2, 0), np.int64)]
    for number, band in enumerate(BANDS if similarity < 1 else ()):
        # A text that differs in one place of a tenth of its length is the same in 45 % of it, at an end.
        longest = MAX_BYTES if band == BANDS[-1] else round(4.5 * band)
        ends = index.text_quality(f"ends_{band}")[f"ends_{band}"]
        for end in range(2):
            key = ends[:, end].astype(np.uint64)
            likely.append(_neighbours(text, speakers, key, round(1.8 * band) if number else 0, longest))
    numbers = np.concatenate(likely, axis=1)
    pairs = np.stack(np.divmod(np.unique(numbers[1] * len(text) + numbers[0]), max(len(text), 1)))[::-1]
    lengths = text["num_bytes"][pairs]
    pairs = pairs[:, lengths.min(axis=0) >= similarity * lengths.max(axis=0)]
    num_left = max(0, pairs.shape[1] - MAX_COMPARED)
    pairs = pairs[:, :MAX_COMPARED]
    are_alike: list[bool] = []
    for start in range(0, pairs.shape[1], READ_AT_ONCE):
        some = pairs[:, start : start + READ_AT_ONCE].T.tolist()
        are_alike += [_are_alike(index, first, second, similarity) for first, second in some]
        index.release_pages()
    found = np.concatenate([same, pairs[:, np.array(are_alike, bool)]], axis=1)
    rows, first = np.unique(found[1], return_index=True)
    return rows, found[0, first], num_left


def _neighbours(text: np.ndarray, speakers: np.ndarray, key: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Return pairs of rows (2, M) of one speaker with the same key and other audio, next to each other by length."""
    length = np.minimum(text["num_bytes"], MAX_BYTES)
    is_used = (text["num_chars"] >= 0) & (length >= max(MIN_BYTES, shortest)) & (length <= longest)
    rows = np.flatnonzero(is_used)
    mixed = key[rows] * MULTIPLIERS[0] ^ (speakers[rows] + 2).astype(np.uint64) * MULTIPLIERS[1]
    mixed = (mixed & ~np.uint64(MAX_BYTES)) | length[rows].astype(np.uint64)
    order = np.argsort(mixed, kind="stable")
    mixed, rows = mixed[order] >> np.uint64(11), rows[order]
    first, second = rows[:-1], rows[1:]
    is_pair = (mixed[:-1] == mixed[1:]) & (text["audio"][first] != text["audio"][second])
    return np.sort(np.stack([first[is_pair], second[is_pair]]), axis=0)


def _are_alike(index: Index, first: int, second: int, similarity: float) -> bool:
    texts = [normalized(words_of(index.turns(row))) for row in (first, second)]
    shorter, longer = (np.frombuffer(text, np.uint8) for text in sorted(texts, key=len))
    start, end = _num_equal(shorter, longer[: len(shorter)]), _num_equal(shorter[::-1], longer[::-1][: len(shorter)])
    return min(start + end, len(shorter)) >= similarity * len(longer)


def _num_equal(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of elements before the first that differs."""
    differing = np.flatnonzero(first != second)
    return int(differing[0]) if len(differing) else len(first)
