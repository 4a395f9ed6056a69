"""The `flat` format: one recording per JSON object, as JSON Lines or a JSON array, with the keys of many trainers.

{"audio_filepath": "clips/a.wav", "text": "Good morning.", "duration": 2.1, "speaker": 3}        NeMo
{"audio": "a.wav", "text": "Good morning.", "ref_audio": "r.wav"}                                Qwen3-TTS, VoxCPM
{"file_name": "a.wav", "transcription": "Good morning."}                                         AudioFolder

Audio, text, speaker and language have the names of columns in a table. Audio may also be an object with `path` or
`bytes` (base64). With an `offset`, in seconds, the recording is a part of its file, `duration` long. A duration alone
says how long the file is, and is ignored. A reference without its text goes into the system turn, also with
`--reference context`. Other keys are ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import (
    Reading,
    bytes_of,
    check_keys,
    kind_of,
    name_of,
    path_of,
    read_items,
    scene_text_of,
    seconds_of,
)
from higgs_ds.data.formats.jsonio import json_items
from higgs_ds.data.formats.recordings import (
    AUDIO_COLUMNS,
    LANGUAGE_COLUMNS,
    SPEAKER_COLUMNS,
    TEXT_COLUMNS,
    Columns,
    clip_of,
    columns_of,
    sample_of_recording,
    words_of,
)
from higgs_ds.data.templates import CONTEXT, IN_SYSTEM, Recording, Reference
from higgs_ds.model.sample import AudioClip, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

FILE_NAME = "metadata.jsonl"  # read where a folder is given
REFERENCE_KEYS = ("ref_audio", "reference_audio", "prompt_audio", "ref_wav", "prompt_wav", "ref_audio_path")
REFERENCE_TEXT_KEYS = ("ref_text", "reference_text", "prompt_text", "ref_transcript", "prompt_transcript")
STYLE_KEYS = ("description", "style", "style_prompt", "instruct", "instruction")
KEYS = (
    *AUDIO_COLUMNS, *TEXT_COLUMNS, *SPEAKER_COLUMNS, *LANGUAGE_COLUMNS, "offset", "duration",
    *REFERENCE_KEYS, *REFERENCE_TEXT_KEYS, *STYLE_KEYS,
)  # fmt: skip


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of a list of recordings, or of a folder with one in metadata.jsonl."""
    path = path / FILE_NAME if path.is_dir() else path
    return read_items(path, json_items(path), options, build)


@functools.lru_cache(maxsize=64)
def keys_of(names: tuple[str, ...]) -> Columns | str:
    """Find the keys to read among those of an object; as a string, which are missing."""
    return columns_of(list(names), "key")


def build(raw: Any, reading: Reading) -> Sample | None:
    """Build one sample from its JSON value."""
    if not isinstance(raw, dict):
        reading.report("sample", f"must be an object with the path of a recording and its text, but is {kind_of(raw)}")
        return None
    raw = {name.strip().casefold(): value for name, value in raw.items()}
    check_keys(raw, KEYS, "", reading)
    keys = keys_of(tuple(name for name, value in raw.items() if value is not None))
    if isinstance(keys, str):
        reading.report("sample", keys)
        return None
    clip = _part(_audio(raw[keys.audio], keys.audio, reading), raw, reading)
    words = words_of(raw[keys.text], keys.text, reading)
    speaker = name_of(raw, (keys.speaker,), reading, allow_numbers=True) if keys.speaker else None
    language = name_of(raw, (keys.language,), reading) if keys.language else None
    reference = _reference(raw, reading)
    if clip is None or words is None or reading.faults:
        return None
    references = () if reference is None else (reference,)
    if reference and reference.clip and not reference.words and reading.options.reference_placement == CONTEXT:
        reading = replace(reading, options=replace(reading.options, reference=IN_SYSTEM))
    return sample_of_recording(Recording(clip, words, speaker, language, references=references), reading)


def _audio(value: Any, where: str, reading: Reading) -> AudioClip | None:
    if isinstance(value, dict) and value.get("bytes") is not None:
        data = bytes_of(value["bytes"], f"{where}.bytes", reading)
        return None if data is None else AudioClip(reading.manifest, data=data)
    if isinstance(value, dict):
        return clip_of(path_of(value.get("path"), f"{where}.path", reading))
    return clip_of(path_of(value, where, reading))


def _part(clip: AudioClip | None, raw: Mapping[str, Any], reading: Reading) -> AudioClip | None:
    """Return the part of a clip that an offset selects."""
    if raw.get("offset") is None:
        return clip
    offset_s = seconds_of(raw["offset"], "offset", reading, allow_zero=True)
    duration_s = seconds_of(raw.get("duration"), "duration", reading, allow_zero=False)
    return None if clip is None or offset_s is None else replace(clip, offset_s=offset_s, duration_s=duration_s)


def _reference(raw: Mapping[str, Any], reading: Reading) -> Reference | None:
    """Return the voice that a recording refers to: a clip with its words, or a description of the style."""
    audio, text, style = (_first(raw, keys) for keys in (REFERENCE_KEYS, REFERENCE_TEXT_KEYS, STYLE_KEYS))
    if audio is None and style is None:
        return None
    clip = None if audio is None else _audio(raw[audio], audio, reading)
    words = None if audio is None or text is None else words_of(raw[text], text, reading)
    description = None if style is None else scene_text_of(raw[style], style, reading)
    return Reference(clip, words, description=description)


def _first(raw: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """Return the first key with a value; an empty text counts as none."""
    return next((key for key in keys if raw.get(key) not in (None, "")), None)
