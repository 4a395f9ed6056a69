"""Check a manifest in one pass and in bounded memory: every sample and clip is checked, counted and reported."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TypeVar

from higgs_ds.common.threads import map_in_threads
from higgs_ds.data.audio import AudioError, ClipTooLongError, examine
from higgs_ds.data.coder import Coder
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.reader import pending_entries
from higgs_ds.data.index import stamp_of
from higgs_ds.data.index_writer import CheckedClip, CheckedSample
from higgs_ds.data.mel_features import SAMPLE_RATE
from higgs_ds.data.quality import ClipQuality
from higgs_ds.data.references import plain_form
from higgs_ds.data.spoken_text import examine_sample
from higgs_ds.data.token_counter import TokenCounter
from higgs_ds.model.sample import ASSISTANT, AudioClip, Entry, PendingEntry
from higgs_ds.options.train import DataOptions

CHUNK = 128  # entries that a thread takes at a time
REMEMBERED = 1 << 14  # files and clips that are not examined again
MAX_SHOWN = 20  # problems that are kept for display; a list in a file has all
T = TypeVar("T")
MISSING = -1, -1  # instead of a file's size and modification time
USUAL_RATE_AND_HOP = 24000, 960


@dataclass(frozen=True)
class Share:
    """The samples that a process checks: those whose number modulo `count` is `index`."""

    index: int = 0
    count: int = 1

    def of(self, entries: Iterator[T]) -> Iterator[tuple[int, T]]:
        return islice(enumerate(entries), self.index, None, self.count)


@dataclass
class SurveyResult:
    """What one process has found in its share of a manifest. Lines are stored with the number of their sample."""

    num_entries: int = 0
    num_bad: int = 0
    num_problems: int = 0
    problems: list[tuple[int, str]] = field(default_factory=list)  # the first MAX_SHOWN
    left_out: Counter[str] = field(default_factory=Counter)  # number of samples by what the prompt has no place for


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
    """Clips that are not encoded yet: the numbers of samples with them, and the seconds of each, by shortened key."""

    numbers: array[int] = field(default_factory=lambda: array("q"))
    keys: dict[int, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.keys.values())

    def add(self, number: int, clips: Sequence[ClipFacts], sample_rate: int) -> None:
        missing = [clip for clip in clips if not clip.is_cached]
        if not missing:
            return
        new = {c.short_key: c.num_samples / sample_rate for c in missing if c.short_key not in self.keys}
        if new:
            self.numbers.append(number)
            self.keys |= new

    @classmethod
    def merged(cls, parts: Sequence[MissingClips]) -> MissingClips:
        """Return the clips of several shares."""
        numbers = array("q", sorted(number for part in parts for number in part.numbers))
        return cls(numbers, {key: seconds for part in parts for key, seconds in part.keys.items()})


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

    @cached_property
    def stored(self) -> CheckedClip:
        """What an index stores of the clip."""
        return CheckedClip(self.key, self.num_frames, self.num_outputs)

    @property
    def short_key(self) -> int:
        """The key as a number that takes little memory: eight bytes of it distinguish a million clips."""
        return int(self.key[:16], 16) * 2 + bool(self.num_outputs)


@dataclass
class CheckedEntry:
    """The result of checking one sample: its faults, or everything that an index stores of it."""

    number: int
    source: str
    faults: list[str]
    clips: Sequence[ClipFacts] = ()
    files: tuple[tuple[str, int, int], ...] = ()
    checked: CheckedSample | None = None
    left_out: tuple[str, ...] = ()


class Checker:
    """Checks samples against the requirements of the base and its codec."""

    def __init__(self, options: DataOptions, coder: Coder | None) -> None:
        """Without a coder (the base cannot be used), clips are only decoded, so their problems are still reported."""
        self.options = options
        self.coder = coder
        self.sample_rate, self.hop_length = (
            (coder.codec.sample_rate, coder.codec.hop_length) if coder else USUAL_RATE_AND_HOP
        )
        self._counter = TokenCounter(coder) if coder else None
        self._facts_of_file = lru_cache(maxsize=REMEMBERED)(self._examine)
        # Older than the facts of the file's clips, so that a change between the two is detected.
        self._stamp_of = lru_cache(maxsize=REMEMBERED)(stamp_of)

    def facts(self, clip: AudioClip, is_heard: bool) -> ClipFacts:
        """Return the properties of a clip.

        Args:
            is_heard: whether a Whisper tower encodes the clip, in a model that has one.

        Raises:
            AudioError, OSError: the clip cannot be used.
        """
        return self._facts_of_file(clip, is_heard) if clip.data is None else self._examine(clip, is_heard)

    def entry(self, pending: PendingEntry) -> Entry:
        """Return an entry as the base's family can speak it: with what its prompt has a place for, or the faults."""
        entry = pending()
        if self.coder is None or entry.sample is None:
            return entry
        spoken = self.coder.family.as_spoken(entry.sample, self.coder.tokenizer.vocabulary)
        if spoken.sample is entry.sample and not spoken.faults:
            return entry
        return replace(
            entry,
            sample=None if spoken.faults else spoken.sample,
            faults=(*entry.faults, *spoken.faults),
            left_out=spoken.left_out,
        )

    def check(self, pending: Sequence[tuple[int, PendingEntry]]) -> list[CheckedEntry]:
        """Check samples with their clips, and count their tokens if there is a coder."""
        entries = [(number, self.entry(entry)) for number, entry in pending]
        checked = [self._check_clips(number, entry) for number, entry in entries]
        samples = [(one, entry.sample) for one, (_, entry) in zip(checked, entries, strict=True)]
        good = [(one, sample) for one, sample in samples if sample is not None and not one.faults]
        if self._counter is not None:
            texts = self._counter.count_texts(sample.messages for _, sample in good)
            for one, sample in good:
                clips = tuple([clip.stored for clip in one.clips])
                num_tokens = self._counter.count(sample.messages, clips, texts)
                one.checked = CheckedSample(
                    one.number, sample, num_tokens, clips, one.files, plain_form(sample),
                    last_clip_s=self._seconds(one.clips[-1]) if clips else 0.0,
                    quality=examine_sample(sample, [clip.quality for clip in one.clips]),
                )  # fmt: skip
        return checked

    def _seconds(self, clip: ClipFacts) -> float:
        """Return the duration of a clip, before its ends are trimmed."""
        is_trimmed = self.options.trim_silence is not None
        return clip.quality.duration_s if is_trimmed else clip.num_frames * self.hop_length / self.sample_rate

    def _check_clips(self, number: int, entry: Entry) -> CheckedEntry:
        """Check the clips of one sample."""
        sample, faults = entry.sample, list(entry.faults)
        if sample is None:
            return CheckedEntry(number, entry.source, faults)
        left_out = entry.left_out
        to_check = [(clip, m.role != ASSISTANT) for m in sample.messages for clip in m.clips]
        files = self._stamps(to_check, sample.text_files)  # before anything is read, so that later changes are detected
        clips = []
        for clip, is_heard in to_check:
            try:
                clips.append(self.facts(clip, is_heard))
            except (AudioError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                if clip.data is not None:
                    faults.append(f"audio: {reason}")
                elif printable(clip.path) == entry.source:  # the line already starts with the name of the audio file
                    faults.append(f"{reason}")
                else:
                    faults.append(f"{clip.path}: {reason}")
        return CheckedEntry(number, entry.source, list(dict.fromkeys(faults)), clips, files, left_out=left_out)

    def _stamps(
        self, clips: Sequence[tuple[AudioClip, bool]], text_files: Sequence[Path]
    ) -> tuple[tuple[str, int, int], ...]:
        """Return every file that a sample is read from, except its manifest, with its size and modification time."""
        paths = [str(clip.path) for clip, _ in clips if clip.data is None] + [str(path) for path in text_files]
        return tuple([(path, *(self._stamp_of(path) or MISSING)) for path in dict.fromkeys(paths)])

    def _examine(self, clip: AudioClip, is_heard: bool) -> ClipFacts:
        max_s, rate, hop = self.options.max_clip_s, self.sample_rate, self.hop_length
        hearing = self.coder.hearing if self.coder and is_heard else None
        silence_db, rest_s = self.options.silence_db, self.options.trim_silence
        trimmed = () if rest_s is None else (rest_s, silence_db)
        try:
            key = self.coder.cache.key(clip, trimmed) if self.coder else ""
        except OSError as error:
            if clip.data is None and not clip.path.is_file():  # no file either where a part of its path is a file
                raise AudioError("no such file") from error
            raise
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
    keep: Callable[[list[CheckedSample]], None],
    report_invalid: Callable[[int, str], None],
) -> tuple[SurveyResult, MissingClips]:
    """Check a share of a manifest's samples. Pass the good ones to `keep`, each problem to `report_invalid`."""
    result, missing = SurveyResult(), MissingClips()
    entries = share.of(pending_entries(path, checker.options))
    chunks = iter(lambda: list(islice(entries, CHUNK)), [])
    for checked in map_in_threads(checker.check, chunks, num_threads):
        for entry in checked:
            result.num_entries += 1
            result.num_bad += bool(entry.faults)
            if entry.left_out:
                result.left_out.update(entry.left_out)
            for fault in entry.faults:
                line = f"{entry.source}: {fault}"
                result.num_problems += 1
                report_invalid(entry.number, line)
                if len(result.problems) < MAX_SHOWN:
                    result.problems.append((entry.number, line))
            if entry.checked is not None:
                missing.add(entry.number, entry.clips, checker.sample_rate)
        keep([entry.checked for entry in checked if entry.checked is not None])
    return result, missing


def missing_clips(path: Path, checker: Checker, missing: MissingClips) -> Iterator[ClipToEncode]:
    """Read a manifest again and yield the clips that are still to be encoded, each once."""
    remaining = set(missing.keys)
    numbers = iter(missing.numbers)
    wanted = next(numbers, None)
    for number, pending in enumerate(pending_entries(path, checker.options)):
        if number != wanted:
            continue
        entry, wanted = checker.entry(pending), next(numbers, None)
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


def describe_left_out(findings: Sequence[SurveyResult], coder: Coder | None) -> list[str]:
    """Return what of the samples the base's prompt has no place for, one line each."""
    counts = sum((found.left_out for found in findings), Counter[str]())
    title = coder.family.title if coder else ""
    return [f"{what} of {count:,} samples left out: {title} has no place for it" for what, count in counts.items()]
