"""Cues: what is said from when to when, as subtitles give it; and which of them are no speech of one speaker."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

MUSIC = re.compile(
    r"[♩♪♫♬🎵🎶]|[\[(*][^\])*]*\b(?:music|musik|musique|música|музыка|singing)\b[^\])*]*[\])*]", re.IGNORECASE
)
SOUND = re.compile(r"\[[^\]]*\]|\([^)]*\)|\*[^*]*\*|<[^>]*>")  # [applause], (laughs), <p:>
SILENCE = {"sil", "sp", "spn", "silence", "silent"}  # labels of aligners and of Praat
TURN = re.compile(r"^\s*(?:[-\u2013\u2014](?=\s)|>>)\s*(?=\S)")  # a dash or >> where another speaker begins
SENTENCE_END = re.compile(r"[.!?\u2026\u3002\uff01\uff1f\uff61][\"'\u201d\u2019\u00bb)\]]*$")
OVERLAP_S = 0.25  # subtitles' times are approximate; a shorter overlap is not two voices

NO_SPEECH = "a mark of a sound or of silence, no words"
MUSIC_MARK = "music"
TWO_SPEAKERS = "two speakers in one subtitle"
OVERLAP = "overlaps with another subtitle"
NO_DURATION = "ends before it begins"
OUTSIDE = "after the end of the recording"


@dataclass(frozen=True)
class Word:
    """A word with its times, in seconds. The text may begin with the space before the word."""

    start_s: float
    end_s: float
    text: str
    speaker: str | None = None


@dataclass(frozen=True)
class Cue:
    """Text with its times, in seconds, and its words, where their times are known."""

    start_s: float
    end_s: float
    text: str
    speaker: str | None = None
    words: tuple[Word, ...] = ()
    several_speakers: bool = False

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def clean(text: str) -> str:
    """Return a subtitle's text on one line, without entities, control characters and the mark of a turn."""
    text = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in html.unescape(text))
    return TURN.sub("", " ".join(text.split()))


def join_texts(texts: Iterable[str]) -> str:
    """Join texts with spaces, but for scripts that are written without them."""
    joined = ""
    for text in texts:
        space = joined and text and not (_is_wide(joined[-1]) or _is_wide(text[0]))
        joined += f" {text}" if space else text
    return joined


def join_words(words: Sequence[Word]) -> str:
    """Join words: Whisper's have the spaces that belong between them, those of others have none."""
    if any(word.text.startswith(" ") for word in words):
        return clean("".join(word.text for word in words))
    return join_texts(clean(word.text) for word in words)


def _is_wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF" and not "\uac00" <= char <= "\ud7a3"  # Korean has spaces


def is_dialogue(text: str) -> bool:
    """Return whether two or more lines of a subtitle begin with the mark of another speaker."""
    return sum(TURN.match(html.unescape(line)) is not None for line in text.splitlines()) > 1


def by_speaker(cue: Cue) -> list[Cue]:
    """Divide a cue whose words are of several speakers; otherwise return it alone."""
    speakers = {word.speaker for word in cue.words} - {None}
    if len(speakers) <= 1:
        return [cue]
    runs = [list(run) for _, run in groupby(cue.words, lambda word: word.speaker or cue.speaker)]
    return [part_of(cue, run) for run in runs]


def part_of(cue: Cue, words: Sequence[Word]) -> Cue:
    """Return the part of a cue that consists of consecutive words of one speaker."""
    return replace(
        cue,
        start_s=words[0].start_s,
        end_s=words[-1].end_s,
        text=join_words(words),
        speaker=words[0].speaker or cue.speaker,
        words=tuple(words),
    )


def reasons_against(cues: Sequence[Cue], duration_s: float) -> list[str | None]:
    """Return for each cue, in order of their starts, why it is no speech of one speaker; None if it is.

    Args:
        duration_s: length of the recording.
    """
    reasons = [_reason(cue, duration_s) for cue in cues]
    latest = -1  # of the cues before that have words, the one that ends last
    for i, cue in enumerate(cues):
        if reasons[i] in (NO_SPEECH, NO_DURATION, OUTSIDE):
            continue
        if latest >= 0 and _overlap_s(cues[latest], cue) > OVERLAP_S:
            reasons[i] = reasons[i] or OVERLAP
            reasons[latest] = reasons[latest] or OVERLAP
        if latest < 0 or cue.end_s > cues[latest].end_s:
            latest = i
    return reasons


def _overlap_s(first: Cue, second: Cue) -> float:
    return min(first.end_s, second.end_s) - second.start_s


def _reason(cue: Cue, duration_s: float) -> str | None:
    if cue.end_s <= cue.start_s:
        return NO_DURATION
    if cue.start_s >= duration_s:
        return OUTSIDE
    if MUSIC.search(cue.text):
        return MUSIC_MARK
    spoken = SOUND.sub(" ", cue.text)
    if not any(char.isalnum() for char in spoken) or spoken.strip().casefold() in SILENCE:
        return NO_SPEECH
    return TWO_SPEAKERS if cue.several_speakers else None
