"""Plain recordings: what the formats without turns have in common, and the names that their columns go by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from higgs_ds.data.formats.checks import Reading, name_of, text_of
from higgs_ds.data.sample import AudioClip, Sample
from higgs_ds.data.templates import Recording, conversation

LONGEST_TRANSCRIPT = 1 << 20  # bytes
AUDIO_SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")
# Of several columns that a file has, the first one here is taken.
AUDIO_COLUMNS = (
    "audio", "wav_filename", "audio_file", "audio_path", "audio_filepath", "file_name", "filename", "wav", "wav_path",
    "path", "file",
)  # fmt: skip
TEXT_COLUMNS = (
    "transcript", "transcription", "text", "sentence", "text_normalized", "normalized_text", "raw_text",
)  # fmt: skip
SPEAKER_COLUMNS = ("speaker", "speaker_id", "speaker_name", "client_id")
LANGUAGE_COLUMNS = ("language", "lang", "locale")


class Columns(NamedTuple):
    """The columns of a table that are read, by the names that they have in it."""

    audio: str
    text: str
    speaker: str | None
    language: str | None


def columns_of(names: list[str]) -> Columns | str:
    """Which columns are which, in whatever case; or, as a text, what is missing."""
    by_name = {name.strip().casefold(): name for name in reversed(names)}

    def first(known: tuple[str, ...]) -> str | None:
        return next((by_name[name] for name in known if name in by_name), None)

    audio, text = first(AUDIO_COLUMNS), first(TEXT_COLUMNS)
    if audio is None or text is None:
        lacking = [("audio", AUDIO_COLUMNS)] * (audio is None) + [("text", TEXT_COLUMNS)] * (text is None)
        missing = "; ".join(f"has no {what} column; known names: {', '.join(known)}" for what, known in lacking)
        return f"{missing}; it has: {', '.join(map(repr, names[:20]))}"
    return Columns(audio, text, first(SPEAKER_COLUMNS), first(LANGUAGE_COLUMNS))


def sample_of_row(row: Mapping[str, Any], columns: Columns, clip: AudioClip | None, reading: Reading) -> Sample | None:
    """The sample of a row of a table, with the clip that its audio column names or holds."""
    words = words_of(row[columns.text], columns.text, reading)
    speaker = name_of(row, (columns.speaker,), reading, numbers=True) if columns.speaker else None
    language = name_of(row, (columns.language,), reading) if columns.language else None
    return sample_of(clip, words, speaker, language, reading)


def sample_of(
    clip: AudioClip | None, words: str | None, speaker: str | None, language: str | None, reading: Reading
) -> Sample | None:
    """The sample of a clip and its words; None where one of them is at fault."""
    if clip is None or words is None or reading.faults:
        return None
    return sample_of_recording(Recording(clip, words, speaker, language), reading)


def sample_of_recording(recording: Recording, reading: Reading) -> Sample:
    messages, start_index = conversation(recording, reading.options.reference)
    text_files = tuple(reading.text_files)
    return Sample(messages, start_index, recording.speaker, reading.source, recording.language, text_files)


def words_of(text: Any, where: str, reading: Reading) -> str | None:
    """What is said in a clip."""
    words = text_of(text, where, reading)
    return None if words is None else words.strip()


def clip_of(path: Path | None) -> AudioClip | None:
    return None if path is None else AudioClip(path)


def transcript_of(path: Path, where: str, reading: Reading) -> str | None:
    """What a text file holds."""
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_TRANSCRIPT + 1)
    except OSError as error:
        reading.report(where, f"{path.name} cannot be read: {error.strerror}")
        return None
    if len(raw) > LONGEST_TRANSCRIPT:
        reading.report(where, f"{path.name} has more than {LONGEST_TRANSCRIPT} bytes: it is no transcript of a clip")
        return None
    reading.text_files.append(path)
    return words_of(raw.decode("utf-8-sig", "surrogateescape"), where, reading)
