"""Check a manifest in one pass and in bounded memory: every sample and clip is checked, counted and reported."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from higgs_ds.data.audio import AudioError, ClipTooLongError, examine
from higgs_ds.data.coder import Coder
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.reader import read_entries
from higgs_ds.data.index import CheckedClip, CheckedSample, stamp_of
from higgs_ds.data.mel_features import SAMPLE_RATE
from higgs_ds.data.prompt import count_tokens
from higgs_ds.data.quality import ClipQuality
from higgs_ds.data.references import Candidate, candidate_of, pair_of, plain_form
from higgs_ds.data.sample import AudioClip, Entry, Sample
from higgs_ds.data.spoken_text import examine_sample
from higgs_ds.options.train import DataOptions

CHUNK = 32  # entries that a thread takes at a time
MAX_SHOWN = 1000  # problems that are kept for display
USUAL_RATE_AND_HOP = 24000, 960


@dataclass(frozen=True)
class Share:
    """The samples that a process checks: those whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    def of(self, entries: Iterator[Entry]) -> Iterator[tuple[int, Entry]]:
        return islice(enumerate(entries), self.index, None, self.count)


@dataclass
class SurveyResult:
    """What one process has found in its share of a manifest. Lines are stored with the number of their sample."""

    num_entries: int = 0
    num_bad: int = 0
    num_problems: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)  # the first MAX_SHOWN


@dataclass(frozen=True)
class ClipToEncode:
    """A clip that is not in the cache yet."""

    clip: AudioClip
    key: str
    num_samples: int  # at the codec's rate
    quality: ClipQuality | None
    is_heard: bool = False  # whether a Whisper tower encodes it


@dataclass
class MissingClips:
    """Clips that are not encoded yet: the numbers of their samples, their shortened keys, and their total seconds."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    keys: set[int] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, number: int, clips: Sequence[ClipFacts], sample_rate: int) -> None:
        new = {clip.short_key: clip for clip in clips if not clip.is_cached and clip.short_key not in self.keys}
        if new:
            self.numbers.append(number)
            self.keys |= new.keys()
            self.seconds += sum(clip.num_samples for clip in new.values()) / sample_rate


@dataclass(frozen=True)
class ClipFacts:
    """A good clip: the key of its codes, their number of frames, and whether its codes and features are all stored.

    `num_outputs`: for a clip that a Whisper tower encodes, the outputs of each stretch.
    """

    key: str
    num_frames: int
    num_samples: int
    quality: ClipQuality
    is_cached: bool
    num_outputs: tuple[int, ...] = ()
    stretch: tuple[float, float] | None = None  # offset and duration to encode instead of the clip's, in seconds

    @property
    def short_key(self) -> int:
        """The key as a number that takes little memory: eight bytes of it distinguish a million clips."""
        return int(self.key[:16], 16) * 2 + bool(self.num_outputs)


@dataclass(frozen=True)
class CheckedEntry:
    """The result of checking one sample: its faults, or everything that an index stores of it."""

    number: int
    source: str
    faults: list[str]
    checked: CheckedSample | None = None
    clips: Sequence[ClipFacts] = ()


class Checker:
    """Checks samples against the requirements of the base and its codec."""

    def __init__(self, options: DataOptions, coder: Coder | None) -> None:
        """Without a coder (the base cannot be used), clips are only decoded, so their problems are still reported."""
        self.options = options
        self.coder = coder
        self.sample_rate, self.hop_length = (
            (coder.codec.sample_rate, coder.codec.hop_length) if coder else USUAL_RATE_AND_HOP
        )
        self._facts_of_file = lru_cache(maxsize=1 << 14)(self._examine)

    def facts(self, clip: AudioClip, is_heard: bool) -> ClipFacts:
        """Return the properties of a clip.

        Args:
            is_heard: whether a Whisper tower encodes the clip, in a model that has one.

        Raises:
            AudioError, OSError: the clip cannot be used.
        """
        return self._facts_of_file(clip, is_heard) if clip.data is None else self._examine(clip, is_heard)

    def check_entry(self, number: int, entry: Entry) -> CheckedEntry:
        """Check one sample's clips, and count its tokens if there is a coder."""
        sample, faults = entry.sample, list(entry.faults)
        stamps = _stamps(sample) if sample else []  # before anything is read, so that a later change is detected
        facts: dict[tuple[AudioClip, bool], ClipFacts] = {}
        clips_to_check = list(zip(sample.clips, sample.is_heard, strict=True)) if sample else []
        for clip, is_heard in clips_to_check:
            try:
                facts[clip, is_heard] = facts.get((clip, is_heard)) or self.facts(clip, is_heard)
            except (AudioError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                if clip.data is not None:
                    faults.append(f"audio: {reason}")
                elif printable(clip.path) == entry.source:  # the line already starts with the name of the audio file
                    faults.append(f"{reason}")
                else:
                    faults.append(f"{clip.path}: {reason}")
        if sample is None or faults or self.coder is None:
            return CheckedEntry(number, entry.source, list(dict.fromkeys(faults)))
        clips = [facts[clip, is_heard] for clip, is_heard in clips_to_check]
        plain = plain_form(sample)
        checked = CheckedSample(
            number=number,
            sample=sample,
            num_tokens=self._count_tokens(sample, clips),
            clips=tuple(CheckedClip(clip.key, clip.num_frames, clip.num_outputs) for clip in clips),
            files=tuple((path, *stamp) for path, stamp in stamps if stamp),
            plain=plain,
            plain_tokens=self._count_tokens(plain.of(sample), [clips[i] for i in plain.clips]) if plain else 0,
            candidate=self._candidate(sample, clips[-1]) if clips else None,
            quality=examine_sample(sample, [clip.quality for clip in clips]),
        )
        return CheckedEntry(number, entry.source, [], checked, clips)

    def _count_tokens(self, sample: Sample, clips: Sequence[ClipFacts]) -> int:
        assert self.coder is not None
        hearing, num_frames = self.coder.hearing, [clip.num_frames for clip in clips]
        stretches = [hearing.stretches(clip.num_frames, clip.num_outputs) for clip in clips] if hearing else []
        return count_tokens(sample, num_frames, self.coder.tokenizer, self.coder.stream, stretches)

    def _candidate(self, sample: Sample, target: ClipFacts) -> Candidate | None:
        """Return what a sample's target, its last clip, is as a reference for others."""
        pair = pair_of(sample)
        if pair is None:
            return None
        seconds = target.num_frames * self.hop_length / self.sample_rate
        if self.options.trim_silence is not None:
            seconds = target.quality.duration_s
        # Segments are tokenized separately, so that a pair adds the same to every sample. Alone, it begins the text.
        num_tokens = self._count_tokens(replace(sample, messages=pair), [target]) - 1
        return candidate_of(sample, target.key, sample.clips[-1], seconds, num_tokens)

    def _examine(self, clip: AudioClip, is_heard: bool) -> ClipFacts:
        max_s, rate, hop = self.options.max_clip_s, self.sample_rate, self.hop_length
        hearing = self.coder.hearing if self.coder and is_heard else None
        if clip.data is None and not clip.path.is_file():
            raise AudioError("no such file" if not clip.path.exists() else "is not a file")
        silence_db, rest_s = self.options.silence_db, self.options.trim_silence
        trimmed = () if rest_s is None else (rest_s, silence_db)
        key = self.coder.cache.key(clip, trimmed) if self.coder else ""
        cached = self.coder.cache.facts(key, self.coder.stream.num_codebooks) if self.coder else None
        num_outputs = hearing.kept_outputs(key) if hearing else ()
        is_cached = cached is not None and num_outputs is not None
        if cached is not None and num_outputs is not None:
            num_frames, quality = cached
            # Codes of an earlier version have no measurements, and those of other options have other ones.
            if quality is not None and quality.has_silence_db(silence_db) and quality.duration_s <= max_s:
                return ClipFacts(key, num_frames, num_frames * hop, quality, True, num_outputs)
        try:
            facts = examine(clip, max_s, rate, silence_db, rest_s)
        except ClipTooLongError as error:
            raise AudioError(
                f"lasts {error.seconds:.1f} s, longer than --max_clip_s {max_s:g}; cut it with offset and duration"
            ) from error
        num_samples = facts.num_samples(rate)
        if num_samples < hop:
            raise AudioError(
                f"lasts {num_samples / rate:.3f} s, shorter than one frame of the codec ({hop / rate:.3f} s)"
            )
        num_frames = self.coder.codec.num_frames(num_samples) if self.coder else 0
        num_outputs = hearing.num_outputs(facts.num_samples(SAMPLE_RATE), num_frames) if hearing else ()
        stretch = None
        if rest_s is not None:
            stretch = clip.offset_s + facts.start / facts.source_rate, facts.source_samples / facts.source_rate
        return ClipFacts(key, num_frames, num_samples, facts.quality, is_cached, num_outputs, stretch)


def survey(
    path: Path,
    checker: Checker,
    share: Share,
    num_threads: int,
    keep: Callable[[CheckedSample], None],
    report_invalid: Callable[[int, str], None],
) -> tuple[SurveyResult, MissingClips]:
    """Check a share of a manifest's samples. Pass each good one to `keep`, each problem to `report_invalid`."""
    result, missing = SurveyResult(), MissingClips()
    for entry in _check_in_threads(path, checker, share, num_threads):
        result.num_entries += 1
        result.num_bad += bool(entry.faults)
        for fault in entry.faults:
            line = f"{entry.source}: {fault}"
            result.num_problems += 1
            report_invalid(entry.number, line)
            if len(result.problems) < MAX_SHOWN:
                result.problems.append((entry.number, line))
        if entry.checked is not None:
            keep(entry.checked)
            missing.add(entry.number, entry.clips, checker.sample_rate)
    return result, missing


def _check_in_threads(path: Path, checker: Checker, share: Share, num_threads: int) -> Iterator[CheckedEntry]:
    """Check a share of the entries in threads, a few chunks ahead, and yield the results in order."""

    def check_chunk(chunk: list[tuple[int, Entry]]) -> list[CheckedEntry]:
        return [checker.check_entry(number, entry) for number, entry in chunk]

    entries = share.of(read_entries(path, checker.options))
    ahead: deque[Future[list[CheckedEntry]]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        while chunk := list(islice(entries, CHUNK)):
            ahead.append(pool.submit(check_chunk, chunk))
            if len(ahead) > 2 * num_threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stamps(sample: Sample) -> list[tuple[str, tuple[int, int] | None]]:
    """Return every file that a sample is read from, except its manifest, with its size and modification time."""
    paths = [*(clip.path for clip in sample.clips if clip.data is None), *sample.text_files]
    return [(path, stamp_of(path)) for path in dict.fromkeys(map(str, paths))]


def missing_clips(path: Path, checker: Checker, missing: MissingClips) -> Iterator[ClipToEncode]:
    """Read a manifest again and yield the clips that are still to be encoded, each once."""
    remaining = set(missing.keys)
    numbers = iter(missing.numbers)
    wanted = next(numbers, None)
    for number, entry in enumerate(read_entries(path, checker.options)):
        if number != wanted:
            continue
        wanted = next(numbers, None)
        clips = zip(entry.sample.clips, entry.sample.is_heard, strict=True) if entry.sample else ()
        for clip, is_heard in clips:
            facts = checker.facts(clip, is_heard)
            if facts.short_key in remaining:
                remaining.remove(facts.short_key)
                offset_s, duration_s = facts.stretch or (clip.offset_s, clip.duration_s)
                part = replace(clip, offset_s=offset_s, duration_s=duration_s)
                yield ClipToEncode(part, facts.key, facts.num_samples, facts.quality, bool(facts.num_outputs))
        if wanted is None:
            return
