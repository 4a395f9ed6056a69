"""The `metadata` format: a folder of recordings described by its metadata.json. Paths are relative to the folder.

{"dataset_info": {...},
 "samples": [{"id": "s_0", "audio_file": "s_0.wav", "transcript_file": "s_0.txt", "speaker_id": "s", "language": "en",
              "scene": "quiet_room", "ref_audio_file": "r.wav", "ref_transcript": "Said in r.wav."}]}

The transcript may also be given in metadata.json (`transcript` or `text`). For several speakers, replace
`ref_audio_file` by `ref_speakers`, a list of {"speaker_tag": "[SPEAKER0]", "ref_audio_file": ...,
"ref_transcript": ...}. A speaker without a reference clip is described by `gender` (male, female) or `description`.
`task_type` and `user_instruction` add nothing to the other fields and are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import (
    Reading,
    check_keys,
    kind_of,
    name_of,
    path_of,
    read_items,
    scene_text_of,
    shown,
)
from higgs_ds.data.formats.jsonio import array_items
from higgs_ds.data.formats.recordings import clip_of, sample_of_recording, transcript_of, words_of
from higgs_ds.data.templates import CONTEXT, QUIET_ROOM, Recording, Reference
from higgs_ds.model.sample import PendingEntry, Sample
from higgs_ds.options.train import DataOptions

FILE_NAME = "metadata.json"
SAMPLE_KEYS = (
    "id", "audio_file", "transcript_file", "transcript", "text", "duration", "speaker_id", "speaker_name", "scene",
    "emotion", "language", "gender", "quality_score", "original_audio_path", "user_instruction", "task_type",
    "ref_audio_file", "ref_transcript", "ref_speakers",
)  # fmt: skip
SPEAKER_KEYS = ("speaker_tag", "speaker_id", "ref_audio_file", "ref_transcript", "gender", "description")
GENDERS = {"female": "feminine", "male": "masculine", "feminine": "feminine", "masculine": "masculine"}
# Converters from ms-swift leave this tag in the transcripts.
SWIFT_TAG = "<audio>"
_SPEAKER_TAG = re.compile(r"\[?(SPEAKER\d+)\]?", re.ASCII)


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of a folder with a metadata.json, or of that file."""
    path = path / FILE_NAME if path.is_dir() else path
    return read_items(path, array_items(path, "samples"), options, build)


def build(raw: Any, reading: Reading) -> Sample | None:
    """Build one sample from its JSON value."""
    if not isinstance(raw, dict):
        reading.report("sample", f"must be an object with 'audio_file', but is {kind_of(raw)}")
        return None
    check_keys(raw, SAMPLE_KEYS, "", reading)
    clip = clip_of(path_of(raw.get("audio_file"), "audio_file", reading))
    words = _words(raw, reading)
    speaker = name_of(raw, ("speaker_id", "speaker_name"), reading, allow_numbers=True)
    language = name_of(raw, ("language",), reading)
    scene = _scene(raw, reading)
    references = _references(raw, reading)
    if clip is None or words is None or reading.faults:
        return None
    return sample_of_recording(Recording(clip, words, speaker, language, scene, references), reading)


def _words(raw: dict[str, Any], reading: Reading) -> str | None:
    if raw.get("transcript_file") is not None:
        path = path_of(raw["transcript_file"], "transcript_file", reading)
        words = None if path is None else transcript_of(path, "transcript_file", reading)
    else:
        key = next((key for key in ("transcript", "text") if raw.get(key) is not None), None)
        if key is None:
            reading.report("transcript_file", "is missing, and so are 'transcript' and 'text'; give one of them")
            return None
        words = words_of(raw[key], key, reading)
    if words is None or SWIFT_TAG not in words:
        return words
    return words_of(words.replace(SWIFT_TAG, " "), "transcript", reading)


def _scene(raw: dict[str, Any], reading: Reading) -> str:
    if raw.get("scene") in (None, ""):
        return QUIET_ROOM
    scene = scene_text_of(raw["scene"], "scene", reading)
    return QUIET_ROOM if scene is None else f"Audio is recorded from {scene.strip().replace('_', ' ')}."


def _references(raw: dict[str, Any], reading: Reading) -> tuple[Reference, ...]:
    speakers = raw.get("ref_speakers")
    if speakers in (None, []):
        return (_reference(raw, "", None, reading),) if raw.get("ref_audio_file") is not None else ()
    if not isinstance(speakers, list):
        reading.report("ref_speakers", f"must be a list of speakers, but is {kind_of(speakers)}")
        return ()
    references = []
    for i, speaker in enumerate(speakers):
        where = f"ref_speakers[{i}]"
        if not isinstance(speaker, dict):
            reading.report(where, f"must be an object with 'ref_audio_file', but is {kind_of(speaker)}")
            continue
        check_keys(speaker, SPEAKER_KEYS, f"{where}.", reading)
        references.append(_reference(speaker, f"{where}.", _tag(speaker, i, f"{where}.speaker_tag", reading), reading))
    tags = [reference.tag for reference in references]
    if len(set(tags)) < len(tags):
        reading.report(
            "ref_speakers",
            f"has a speaker tag more than once: {', '.join(map(str, tags))}; give each speaker its own speaker_tag",
        )
    return tuple(references)


def _reference(raw: dict[str, Any], prefix: str, tag: str | None, reading: Reading) -> Reference:
    name, words, options = raw.get("ref_audio_file"), raw.get("ref_transcript"), reading.options
    clip = None if name is None else clip_of(path_of(name, f"{prefix}ref_audio_file", reading))
    description = _description(raw, prefix, reading) if prefix else None
    if words is not None:
        words = words_of(words, f"{prefix}ref_transcript", reading)
    elif name is not None and options.reference_placement == CONTEXT:
        reading.report(
            f"{prefix}ref_transcript",
            f"is missing: --reference {options.reference} needs the transcript of ref_audio_file; add it, or pass "
            "--reference system or none",
        )
    if name is None and description is None:
        reading.report(
            f"{prefix}ref_audio_file",
            "is missing, and so are a gender (male or female) and a description of the voice; give one of them",
        )
    return Reference(clip, words, tag, description)


def _description(raw: dict[str, Any], prefix: str, reading: Reading) -> str | None:
    if raw.get("description") is not None:
        return scene_text_of(raw["description"], f"{prefix}description", reading)
    gender = raw.get("gender")
    return GENDERS.get(gender.strip().casefold()) if isinstance(gender, str) else None


def _tag(raw: dict[str, Any], index: int, where: str, reading: Reading) -> str:
    tag = raw.get("speaker_tag")
    if tag is None:
        return f"SPEAKER{index}"
    match = _SPEAKER_TAG.fullmatch(tag) if isinstance(tag, str) else None
    if match is None:
        reading.report(where, f"must have the form [SPEAKER0], but is {shown(tag)}")
        return f"SPEAKER{index}"
    return match[1]
