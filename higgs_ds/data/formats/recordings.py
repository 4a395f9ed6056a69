"""Plain recordings: code shared by the formats without turns, and the column names that are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from higgs_ds.data.formats.checks import Reading, name_of, text_of
from higgs_ds.data.references import plain_form
from higgs_ds.data.templates import Recording, conversation, system_message
from higgs_ds.model.sample import AudioClip, Sample

LONGEST_TRANSCRIPT = 1 << 20  # bytes
AUDIO_SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")
# If a file has several of these columns, the one listed first is used.
AUDIO_COLUMNS = (
    "audio", "wav_filename", "audio_file", "audio_path", "audio_filepath", "file_name", "filename", "wav", "wav_path",
    "path", "file", "filepath", "file_path", "wav_file",
)  # fmt: skip
TEXT_COLUMNS = (
    "transcript", "transcription", "text", "sentence", "text_normalized", "normalized_text", "raw_text",
    "raw_transcript",
)  # fmt: skip
SPEAKER_COLUMNS = ("speaker", "speaker_id", "speaker_name", "client_id", "spk", "spk_id")
LANGUAGE_COLUMNS = ("language", "lang", "locale", "language_id")


class Columns(NamedTuple):
    """The names of the columns that are read from a table, as the table spells them."""

    audio: str
    text: str
    speaker: str | None
    language: str | None


def columns_of(names: list[str], kind: str = "column") -> Columns | str:
    """Find the columns to read among the names of a table, or of another `kind`, ignoring case.

    Returns:
        The columns, or, as a string, which of them are missing.
    """
    by_name = {name.strip().casefold(): name for name in reversed(names)}

    def first(known: tuple[str, ...]) -> str | None:
        return next((by_name[name] for name in known if name in by_name), None)

    audio, text = first(AUDIO_COLUMNS), first(TEXT_COLUMNS)
    if audio is None or text is None:
        missing = [("audio", AUDIO_COLUMNS)] * (audio is None) + [("text", TEXT_COLUMNS)] * (text is None)
        reasons = "; ".join(f"no {what} {kind} (accepted names: {', '.join(known)})" for what, known in missing)
        return f"{reasons}; found: {', '.join(map(repr, names[:20]))}; rename the {kind}s to accepted names"
    return Columns(audio, text, first(SPEAKER_COLUMNS), first(LANGUAGE_COLUMNS))


def sample_of_row(row: Mapping[str, Any], columns: Columns, clip: AudioClip | None, reading: Reading) -> Sample | None:
    """Build the sample of a table row, with the clip that its audio column names or contains."""
    words = words_of(row[columns.text], columns.text, reading)
    speaker = name_of(row, (columns.speaker,), reading, allow_numbers=True) if columns.speaker else None
    language = name_of(row, (columns.language,), reading) if columns.language else None
    return sample_of(clip, words, speaker, language, reading)


def sample_of(
    clip: AudioClip | None, words: str | None, speaker: str | None, language: str | None, reading: Reading
) -> Sample | None:
    """Build the sample of a clip and its transcript; return None if either has a fault."""
    if clip is None or words is None or reading.faults:
        return None
    return sample_of_recording(Recording(clip, words, speaker, language), reading)


def sample_of_recording(recording: Recording, reading: Reading) -> Sample:
    messages, start_index = conversation(recording, reading.options.reference_placement)
    text_files = tuple(reading.text_files)
    sample = Sample(messages, start_index, recording.speaker, reading.source, recording.language, text_files)
    plain = plain_form(sample) if recording.references else None
    if plain is None or plain.messages[0] == system_message(recording):
        return sample
    return replace(sample, plain_system=system_message(recording))


def words_of(text: Any, where: str, reading: Reading) -> str | None:
    """Return the transcript of a clip, checked and stripped, or None if it has a fault."""
    words = text_of(text, where, reading)
    return None if words is None else words.strip()


def clip_of(path: Path | None) -> AudioClip | None:
    return None if path is None else AudioClip(path)


def transcript_of(path: Path, where: str, reading: Reading) -> str | None:
    """Read the transcript in a text file; report a fault and return None if it cannot be used."""
    if not path.is_file() and path.exists():
        reading.report(where, f"{path.name} is not a file")
        return None
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_TRANSCRIPT + 1)
    except OSError as error:
        reading.report(where, f"{path.name} cannot be read: {error.strerror}")
        return None
    if len(raw) > LONGEST_TRANSCRIPT:
        reading.report(
            where,
            f"{path.name} has more than {LONGEST_TRANSCRIPT} bytes, too many for the transcript of one clip; give the "
            "text of this clip only",
        )
        return None
    reading.text_files.append(path)
    return words_of(raw.decode("utf-8-sig", "surrogateescape"), where, reading)
