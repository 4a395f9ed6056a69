"""Summarize a manifest, in lines for the terminal."""

from __future__ import annotations

import numpy as np

from higgs_ds.common.words import counted
from higgs_ds.data.index import Index
from higgs_ds.data.medians import rates_of

BINS_S = (0, 1, 2, 4, 8, 15, 30, 60, 120, 300, float("inf"))
BAR = 40  # characters of the longest bar
NAMED = 5  # number of speakers, languages and samples that are named


def describe(index: Index, frame_rate: float, max_seq_len: int | None) -> str:
    """Return clips, hours, speakers, languages, tokens, speaking rate, level, duplicates, samples that are too long,
    and a histogram.

    Args:
        frame_rate: the codec's frame rate in Hz.
    """
    if len(index) == 0:
        return "samples: 0"
    seconds = index.clip_frames() / frame_rate
    lines = [f"samples: {len(index):,}", f"clips: {len(seconds):,}, {seconds.sum() / 3600:.2f} hours"]
    if len(seconds):
        lines[-1] += f", {seconds.min():.2f} to {seconds.max():.2f} s, {_spread(seconds, ' s')}"
    lines += [_label_line(index, "speaker"), _label_line(index, "language")]
    tokens = index.num_tokens
    lines.append(f"tokens: {tokens.sum():,}, {tokens.min()} to {tokens.max()} per sample")
    if max_seq_len is not None:
        too_long = np.flatnonzero(tokens > max_seq_len)
        lines.append(_rows_line(index, f"samples longer than --max_seq_len {max_seq_len}", too_long))
    lines.append(_rows_line(index, "duplicates of an earlier sample", _repeated(index.digests())))
    lines += _speech_lines(index)
    return "\n".join([*lines, *histogram(seconds)])


def _spread(values: np.ndarray, unit: str = "", low: bool = False) -> str:
    """Return the median and the 95th percentile, on request also the 5th."""
    five, median, ninety_five = np.percentile(values, (5, 50, 95))
    least = f"5th percentile {five:.2f}{unit}, " if low else ""
    return f"median {median:.2f}{unit}, {least}95th percentile {ninety_five:.2f}{unit}"


def _speech_lines(index: Index) -> list[str]:
    text = index.text_quality("num_chars", "speech_s", "level_dbfs")
    rates, has_words = rates_of(text)
    level = text["level_dbfs"][text["level_dbfs"] < 0]
    lines = [f"characters per second: {_spread(rates[has_words], low=True)}"] if has_words.any() else []
    return [*lines, f"level: {_spread(level, ' dBFS', low=True)}"] if len(level) else lines


def histogram(seconds: np.ndarray) -> list[str]:
    """Return a histogram of clip lengths, one line per range, from the shortest to the longest clip."""
    counts, _ = np.histogram(seconds, bins=BINS_S)
    filled = np.flatnonzero(counts)
    ranges = list(zip(BINS_S, BINS_S[1:], counts, strict=False))
    lines = ["clip lengths:"] if len(filled) else []
    for low, high, count in ranges[filled[0] : filled[-1] + 1] if len(filled) else []:
        bar = "#" * -(-count * BAR // max(counts.max(), 1))
        upper = f"to {high:>3} s" if high < float("inf") else "s or more"
        lines.append(f"  {low:>3} {upper:<9} {count:>9,} {bar}")
    return lines


def _label_line(index: Index, name: str) -> str:
    numbers, words = index.labels(name)
    counts = np.bincount(numbers[numbers >= 0], minlength=len(words))
    most_common = np.argsort(-counts, kind="stable")[:NAMED]
    named = "".join(f", {words[number]} ({counts[number]:,})" for number in most_common)
    more = f", {len(counts) - NAMED:,} more" if len(counts) > NAMED else ""
    unnamed = int((numbers < 0).sum())
    without = f"; {counted(unnamed, 'sample')} without a {name}" if unnamed else ""
    return f"{name}s: {len(counts):,}{named}{more}{without}"


def _repeated(digests: np.ndarray) -> np.ndarray:
    """Return the rows whose digest occurs in an earlier row."""
    _, first = np.unique(digests.view("S16"), return_index=True)
    is_repeated = np.ones(len(digests), dtype=bool)
    is_repeated[first] = False
    return np.flatnonzero(is_repeated)


def _rows_line(index: Index, what: str, rows: np.ndarray) -> str:
    named = f": {', '.join(index.sources(rows[:NAMED]))}{', ...' if len(rows) > NAMED else ''}" if len(rows) else ""
    return f"{what}: {len(rows):,}{named}"
