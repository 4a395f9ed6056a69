"""Read subtitles: SRT, WebVTT, the JSON of Whisper and WhisperX, Audacity's labels, Praat's TextGrid."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.slicing.cues import Cue, Word, by_speaker, clean, is_dialogue, join_words

WORD_TIERS = re.compile(r"(?:(?P<speaker>.*?)\s*-\s*)?words?", re.IGNORECASE)  # of the Montreal Forced Aligner
PHONE_TIERS = re.compile(r".*\bphones?", re.IGNORECASE)
APART_S = 0.3  # words of a tier that are farther apart are different utterances
ANNOTATION = re.compile(r"<(?:v[.\w]*\s+(?P<speaker>[^>]+)|(?P<time>(?:\d+:)?\d+:\d+\.\d+)|[^>]*)>")


def read_subtitles(path: Path, tiers: Sequence[str] | None = None) -> list[Cue]:
    """Read subtitles, in order of their starts.

    Args:
        tiers: of a TextGrid, the tiers to read; if None, those of utterances, or those of words if it has no others.

    Raises:
        InputError: the file cannot be read, or is not what its suffix says.
    """
    suffix = path.suffix.lower()
    cues = _textgrid(path, tiers) if suffix == ".textgrid" else READERS[suffix](_text(path), path)
    if not cues:
        raise InputError(f"{path}: has no subtitles")
    parts: list[Cue | Word] = [*cues, *(word for cue in cues for word in cue.words)]
    if not all(math.isfinite(part.start_s) and math.isfinite(part.end_s) for part in parts):
        raise InputError(f"{path}: has times that are not finite numbers")
    return sorted((part for cue in cues for part in by_speaker(cue)), key=lambda cue: (cue.start_s, cue.end_s))


def check_subtitles(path: Path) -> list[str]:
    """Return the problems of a subtitle file's name and of the package that reads it; empty if there are none."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return [f"--subtitles {path}: must be one of {', '.join(SUFFIXES)}"]
    if not path.is_file():
        return [f"--subtitles {path}: {'is not a file' if path.exists() else 'no such file'}"]
    package = PACKAGES.get(suffix)
    if package and importlib.util.find_spec(package[0]) is None:
        return [f"--subtitles {path}: the package {package[1]} is not installed; pip install {package[1]}"]
    return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _srt(text: str, path: Path) -> list[Cue]:
    import pysubs2

    lines, numbered = text.splitlines(), []
    for i, line in enumerate(lines):
        # pysubs2 takes a number at the end of a text for that of the next subtitle, which may have none.
        if "-->" in line and not (i and lines[i - 1].strip().isdecimal()):
            numbered.append("0")
        numbered.append(line)
    events = pysubs2.SSAFile.from_string("\n".join([*numbered, "", "0", ""]), "srt")
    cues = []
    for event in events:
        if "-->" in event.plaintext:
            raise InputError(f"{path}: has a time that cannot be read, after {event.start / 1000:.3f} s")
        words = clean(event.plaintext)
        several = is_dialogue(event.plaintext)
        cues.append(Cue(event.start / 1000, event.end / 1000, words, several_speakers=several))
    return cues


def _vtt(text: str, path: Path) -> list[Cue]:
    import webvtt
    from webvtt.errors import MalformedCaptionError, MalformedFileError

    try:
        captions = webvtt.from_buffer(io.StringIO(text), strict=True)
    except (MalformedCaptionError, MalformedFileError) as error:
        raise InputError(f"{path}: is not WebVTT: {error}") from error
    cues: list[Cue] = []
    last_line = ""
    for caption in captions.captions:
        start_s, end_s = (time.in_milliseconds() / 1000 for time in (caption.start_time, caption.end_time))
        plain = caption.text.split("\n")
        # YouTube's own captions show each line twice: once word by word, then above the next one.
        repeats = len(plain) > 1 and clean(plain[0]) == last_line
        words = _timed_words(caption.raw_text.partition("\n")[2] if repeats else caption.raw_text, start_s, end_s)
        last_line = next((clean(line) for line in reversed(plain) if clean(line)), last_line)
        text = clean("".join(word.text for word in words))
        if text:
            several = len({word.speaker for word in words}) > 1 or is_dialogue(caption.text)
            known = tuple(words) if len(words) > 1 and not several else ()
            cues.append(Cue(start_s, end_s, text, words[0].speaker, known, several))
    return cues


def _timed_words(text: str, start_s: float, end_s: float) -> list[Word]:
    """Divide the text of a cue at its timestamps and voices."""
    found: list[tuple[float, str | None, str]] = []
    time, speaker, position = start_s, None, 0
    for tag in [*ANNOTATION.finditer(text), None]:
        between = text[position : tag.start() if tag else len(text)]
        if between and found and found[-1][:2] == (time, speaker):
            found[-1] = (time, speaker, found[-1][2] + between)
        elif between.strip():
            found.append((time, speaker, between))
        if tag is None:
            break
        position = tag.end()
        speaker = clean(tag["speaker"]) if tag["speaker"] else speaker
        if tag["time"]:
            time = sum(60**i * float(part) for i, part in enumerate(reversed(tag["time"].split(":"))))
    starts = [*(start for start, _, _ in found), end_s]
    return [Word(start, starts[i + 1], text, who) for i, (start, who, text) in enumerate(found)]


def _json(text: str, path: Path) -> list[Cue]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON: {error}") from error
    segments = content.get("segments") if isinstance(content, dict) else content
    if not isinstance(segments, list):
        raise InputError(f"{path}: has no list of segments, as Whisper and WhisperX write it")
    try:
        return [_segment(segment) for segment in segments]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: has segments without start, end and text: {type(error).__name__}: {error}"
        ) from error


def _segment(segment: Mapping[str, Any]) -> Cue:
    speaker = segment.get("speaker")
    words = _joined_to_timed(segment.get("words") or [])
    return Cue(float(segment["start"]), float(segment["end"]), clean(segment["text"]), speaker, tuple(words))


def _joined_to_timed(words: Sequence[Mapping[str, Any]]) -> list[Word]:
    """Return words with times. WhisperX has none for numbers: they are joined to the word before, or after."""
    timed: list[Word] = []
    waiting = ""
    for word in words:
        text = word["word"]
        if "start" in word and "end" in word:
            start_s, end_s = float(word["start"]), float(word["end"])
            timed.append(Word(start_s, end_s, waiting + text, word.get("speaker")))
            waiting = ""
        elif timed:
            last = timed[-1]
            timed[-1] = Word(last.start_s, last.end_s, f"{last.text} {text.strip()}", last.speaker)
        else:
            waiting += text.strip() + " "
    return timed


def _audacity(text: str, path: Path) -> list[Cue]:
    cues, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("\\"):  # a line with a backslash has the label's range of frequencies
            continue
        start, _, rest = line.partition("\t")
        end, _, label = rest.partition("\t")
        try:
            cues.append(Cue(float(start.replace(",", ".")), float(end.replace(",", ".")), clean(label)))
        except ValueError:
            problems.append(f"{path}:{number}: is not a label of Audacity: start, end and text with tabs between them")
    if problems:
        raise InputError(problems)
    return cues


def _textgrid(path: Path, tiers: Sequence[str] | None) -> list[Cue]:
    from praatio import textgrid
    from praatio.utilities.constants import INTERVAL_TIER
    from praatio.utilities.errors import PraatioException

    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except (PraatioException, ValueError, IndexError, AttributeError, KeyError, OSError) as error:
        raise InputError(f"{path}: is not a TextGrid: {type(error).__name__}: {error}") from error
    names = [tier.name for tier in grid.tiers if tier.tierType == INTERVAL_TIER]
    missing = [name for name in tiers or () if name not in names]
    if missing:
        raise InputError(f"{path}: --tiers {' '.join(missing)}: it has the interval tiers {', '.join(names) or 'none'}")
    if tiers is None:
        spoken = [name for name in names if not PHONE_TIERS.fullmatch(name)]
        tiers = [name for name in spoken if not WORD_TIERS.fullmatch(name)] or spoken
    cues: list[Cue] = []
    for name in tiers:
        of_words = WORD_TIERS.fullmatch(name)
        entries = [Word(float(start), float(end), clean(text)) for start, end, text in grid.getTier(name).entries]
        if of_words:
            cues += [_utterance(words, of_words["speaker"]) for words in _utterances(entries)]
        else:
            cues += [Cue(entry.start_s, entry.end_s, entry.text, name) for entry in entries]
    return cues


def _utterances(words: Sequence[Word]) -> list[list[Word]]:
    found: list[list[Word]] = []
    for word in words:
        if found and word.start_s - found[-1][-1].end_s <= APART_S:
            found[-1].append(word)
        else:
            found.append([word])
    return found


def _utterance(words: Sequence[Word], speaker: str | None) -> Cue:
    return Cue(words[0].start_s, words[-1].end_s, join_words(words), speaker, tuple(words))


READERS: dict[str, Callable[[str, Path], list[Cue]]] = {
    ".srt": _srt, ".vtt": _vtt, ".json": _json, ".txt": _audacity,
}  # fmt: skip
SUFFIXES = (*READERS, ".textgrid")
PACKAGES = {".srt": ("pysubs2", "pysubs2"), ".vtt": ("webvtt", "webvtt-py"), ".textgrid": ("praatio", "praatio")}
