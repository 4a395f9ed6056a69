"""Find samples that may be bad in an index: by limits, and by the medians of the corpus.

Flagged samples are counted and listed; nothing is left out. Memory is that of a few arrays with a number for each clip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from higgs_ds.common.console import say
from higgs_ds.common.files import check_folders, replaced_file, saving
from higgs_ds.common.words import counted
from higgs_ds.data.index import Index
from higgs_ds.data.medians import Groups, Medians, groups_of, rates_of
from higgs_ds.data.repeats import like_texts, same_audio
from higgs_ds.data.spoken_text import SCRIPTS
from higgs_ds.options.flags import FlagOptions

NAMED = 3  # samples that are named for each kind
SLOWEST, FASTEST = 1, 40  # characters per second of speech in any language, where there is no median
MIN_DIFFERENCE_S = 1.0  # from the duration that the median rate gives: short clips vary more


@dataclass(frozen=True)
class Flag:
    """One kind of fault: its rows of the index, in order, a figure for each, and a function that says what was found.

    `remark` is called with a position in `rows`.
    """

    kind: str
    rows: np.ndarray
    figures: np.ndarray
    remark: Callable[[int], str]

    def line(self, source: str, at: int) -> str:
        return f"{source}: {self.remark(at)}"


@dataclass(frozen=True)
class Flagged:
    """All flags of an index."""

    index: Index
    flags: list[Flag] = field(default_factory=list)
    num_uncompared: int = 0  # pairs of texts that start or end alike

    @property
    def rows(self) -> np.ndarray:
        """Rows that are flagged, each once."""
        is_flagged = np.zeros(len(self.index), bool)
        for flag in self.flags:
            is_flagged[flag.rows] = True
        return np.flatnonzero(is_flagged)

    def describe(self) -> list[str]:
        """Return a line for each kind, with its count, and below it the first samples."""
        lines = []
        for flag in self.flags:
            num_samples = 1 + np.count_nonzero(np.diff(flag.rows))
            lines.append(f"{flag.kind}: {num_samples:,} sample{'s' if num_samples > 1 else ''}")
            lines += [f"  {flag.line(source, i)}" for i, source in enumerate(self.index.sources(flag.rows[:NAMED]))]
            lines += ["  ..."] if len(flag.rows) > NAMED else []
        if self.num_uncompared:
            lines.append(f"not compared: {self.num_uncompared:,} more pairs of texts that start or end alike")
        return lines

    def list_lines(self) -> Iterator[str]:
        """Yield everything, by kind and in manifest order: source, kind, figure and remark, separated by tabs."""
        for flag in self.flags:
            for i, row in enumerate(flag.rows):
                (source,) = self.index.sources([row])
                values = (source, flag.kind, f"{flag.figures[i]:.4g}", flag.remark(i))
                yield "\t".join(" ".join(value.split()) for value in values)


def find_flags(index: Index, options: FlagOptions, trim_silence: float | None, sample_rate: int) -> Flagged:
    """Find what is to be flagged.

    Args:
        trim_silence: seconds of silence that remain at each end of a clip, or None.
        sample_rate: of the codec, in Hz.
    """
    found = [*_clip_flags(index, options, trim_silence, sample_rate)]
    speakers = index.labels("speaker")[0]
    groups = groups_of(index, speakers)
    text = index.text_quality("num_chars", "speech_s", "level_dbfs")
    found += [_rate(text, groups, options), _level(text, groups, options)]
    index.release_pages()
    text = index.text_quality("audio", "words", "num_chars", "num_bytes")
    like, num_uncompared = _like_texts(index, text, speakers, options)
    found += [_same_audio(index, text), like, _script(index, options)]
    index.release_pages()
    return Flagged(index, [flag for flag in found if len(flag.rows)], num_uncompared)


@dataclass(frozen=True)
class _ClipCheck:
    """A limit for a measurement of a clip: the figures, those that exceed it, and what is said with them."""

    kind: str
    what: str
    figure: Callable[[np.ndarray], np.ndarray]
    exceeds: Callable[[np.ndarray], np.ndarray]


def _clip_checks(options: FlagOptions, trim_silence: float | None, sample_rate: int) -> list[_ClipCheck]:
    def remaining(name: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda clips: clips[name] if trim_silence is None else np.minimum(clips[name], trim_silence)

    start_s, end_s = remaining("start_s"), remaining("end_s")
    silence_s, pause_s = options.flag_end_silence_s, options.flag_pause_s
    limits = {
        ("silence at the start", "{:.1f} s of silence at the start"): (start_s, lambda c: start_s(c) > silence_s),
        ("silence at the end", "{:.1f} s of silence at the end"): (end_s, lambda c: end_s(c) > silence_s),
        ("pause", "a pause of {:.1f} s"): (lambda c: c["pause_s"], lambda c: c["pause_s"] > pause_s),
        ("too quiet", "a level of {:.1f} dBFS"): (
            lambda c: c["level_dbfs"],
            lambda c: c["level_dbfs"] < options.flag_level_dbfs,
        ),
        ("clipping", "{:.2%} of its samples at full scale"): (
            lambda c: c["clipped"],
            lambda c: c["clipped"] > options.flag_clipping,
        ),
        ("DC offset", "a mean of {:+.3f} of full scale"): (
            lambda c: c["dc_offset"],
            lambda c: np.abs(c["dc_offset"]) > options.flag_dc_offset,
        ),
        ("bandwidth", "no content above {:.0f} Hz"): (
            lambda c: c["cutoff_hz"],
            lambda c: c["cutoff_hz"] < options.flag_bandwidth * np.minimum(c["rate_hz"], sample_rate) / 2,
        ),
    }
    return [_ClipCheck(*names, *functions) for names, functions in limits.items()]


def _clip_flags(index: Index, options: FlagOptions, trim_silence: float | None, sample_rate: int) -> Iterator[Flag]:
    """Flag clips whose own measurements exceed a limit."""
    checks = _clip_checks(options, trim_silence, sample_rate)
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in checks]
    for clips, rows, numbers in index.clip_quality():
        is_one_of_several = (numbers > 0) | np.append(numbers[1:] > 0, False)
        which = np.where(is_one_of_several, numbers + 1, 0)
        for check, of_check in zip(checks, found, strict=True):
            if (exceeds := check.exceeds(clips)).any():
                of_check.append((rows[exceeds], check.figure(clips)[exceeds], which[exceeds]))
    for check, of_check in zip(checks, found, strict=True):
        if of_check:
            rows, figures, which = (np.concatenate(parts) for parts in zip(*of_check, strict=True))
            order = np.lexsort((which, rows))
            yield _clip_flag(check, rows[order], figures[order], which[order])


def _clip_flag(check: _ClipCheck, rows: np.ndarray, figures: np.ndarray, which: np.ndarray) -> Flag:
    def remark(i: int) -> str:
        return (f"clip {which[i]}: " if which[i] else "") + check.what.format(figures[i])

    return Flag(check.kind, rows, figures, remark)


def _rate(text: np.ndarray, groups: Groups, options: FlagOptions) -> Flag:
    """Flag samples whose characters per second are far from the median of those like them."""
    rate, has_words = rates_of(text)
    medians = Medians.of(rate, has_words, groups.by_language, options.flag_min_clips)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = rate / medians.values
        is_far = np.abs(text["speech_s"] - text["num_chars"] / medians.values) > MIN_DIFFERENCE_S
        is_far &= (ratio > options.flag_rate_ratio) | (ratio * options.flag_rate_ratio < 1)
    if np.isfinite(options.flag_rate_ratio):
        no_speech = text["speech_s"] > text["num_chars"] / SLOWEST + MIN_DIFFERENCE_S
        no_speech |= text["speech_s"] + MIN_DIFFERENCE_S < text["num_chars"] / FASTEST
        is_far |= np.isnan(medians.values) & no_speech
    far = np.flatnonzero(is_far & has_words)

    def remark(i: int) -> str:
        row = far[i]
        usual = f"speech has {SLOWEST} to {FASTEST}"
        if not np.isnan(medians.values[row]):
            usual = f"the median {medians.of_what(row)} is {medians.values[row]:.1f}"
        chars, seconds = text["num_chars"][row], text["speech_s"][row]
        return f"{chars} characters in {seconds:.1f} s: {rate[row]:.1f} per second; {usual}"

    return Flag("characters per second", far, rate[far], remark)


def _level(text: np.ndarray, groups: Groups, options: FlagOptions) -> Flag:
    """Flag samples whose level is far from the median of their speaker."""
    level = text["level_dbfs"]
    has_level = level < 0
    medians_db = Medians.of(level, has_level, groups.by_speaker, options.flag_min_clips)
    differs = has_level & (np.abs(level - medians_db.values) > options.flag_level_difference_db)
    other = np.flatnonzero(differs)

    def remark(i: int) -> str:
        row = other[i]
        of_what = medians_db.of_what(row)
        return f"the level is {level[row]:.1f} dBFS; the median {of_what} is {medians_db.values[row]:.1f}"

    return Flag("level unlike the others", other, level[other], remark)


def _same_audio(index: Index, text: np.ndarray) -> Flag:
    rows, earlier = same_audio(text)
    what = "the same audio as {}, with another text"
    return Flag("same audio, other text", rows, earlier + 1, lambda i: what.format(*index.sources(earlier[i : i + 1])))


def _like_texts(index: Index, text: np.ndarray, speakers: np.ndarray, options: FlagOptions) -> tuple[Flag, int]:
    rows, earlier, num_uncompared = like_texts(index, text, speakers, options.flag_similarity)
    what = "the same or nearly the same text as {}, with other audio"
    remark = lambda i: what.format(*index.sources(earlier[i : i + 1]))  # noqa: E731
    return Flag("like text, other audio", rows, earlier + 1, remark), num_uncompared


def _script(index: Index, options: FlagOptions) -> Flag:
    text = index.text_quality("script_share", "script")
    rows = np.flatnonzero(text["script_share"] < options.flag_script_share)
    share, scripts = text["script_share"][rows], text["script"][rows]
    numbers, names = index.labels("language") if len(rows) else (rows, [])

    def remark(i: int) -> str:
        script = SCRIPTS[scripts[i]].capitalize()
        what = f"{share[i]:.0%} of the letters are in its script; most are {script}"
        return f"the language is {names[numbers[rows[i]]]}, but {what}"

    return Flag("script", rows, share, remark)


def say_flagged(path: Path, flagged: Flagged, where: str) -> None:
    """Print what is flagged of a manifest, if anything is; `where` says where the whole list is."""
    if flagged.flags or flagged.num_uncompared:
        count = f"{len(flagged.rows):,} of {counted(len(flagged.index), 'sample')}"
        say(f"{path}: {count} may be bad; none of them is left out; {where}")
        say("\n".join(f"  {line}" for line in flagged.describe()))


def write_list(path: Path, found: Sequence[Flagged]) -> None:
    """Write all flags to a file, one per line: source, kind, figure and remark, separated by tabs. Raises SaveError."""
    lines = (f"{line}\n".encode(errors="backslashreplace") for flagged in found for line in flagged.list_lines())
    with saving(path), replaced_file(path) as temporary, temporary.open("wb") as file:
        file.writelines(lines)


def list_problems(path: Path | None) -> list[str]:
    """Return why --flagged_list cannot be written; empty if it can."""
    if path is None:
        return []
    problems = check_folders(flagged_list=path.parent)
    if os.path.lexists(path) and not _is_list(path):
        problems.append(f"--flagged_list {path}: exists, and is not a list of flagged samples; choose another file")
    return problems


def _is_list(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        lines = file.read(1 << 16).decode(errors="replace").splitlines()
    return all(line.count("\t") == 3 for line in lines[:-1] or lines)
