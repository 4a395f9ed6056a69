"""The `chatml` format: ChatML as the original runtime reads it, as JSON Lines or a JSON array.

{"messages": [{"role": "user", "content": "Hello."},
              {"role": "assistant", "content": {"type": "audio", "audio_url": "a.wav"}}],
 "start_index": 0, "speaker": "anna", "misc": {"language": "en"}}

`content` is a string, an object, or a list of both. `offset` and `duration`, in seconds, select part of an audio file.
`raw_audio` holds an audio file in base64; it is read where `audio_url` is missing, empty or "placeholder". Assistant
messages from `start_index` on are trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    seconds_of,
    start_index_of,
)
from higgs_ds.data.formats.jsonio import json_items
from higgs_ds.data.formats.turns import Dialect, messages_of, object_of
from higgs_ds.model.sample import ROLES, AudioClip, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

SAMPLE_KEYS = ("messages", "start_index", "speaker", "language", "misc")
AUDIO_KEYS = ("type", "audio_url", "raw_audio", "offset", "duration", "row_id")
NO_URL = ("", "placeholder")  # values of audio_url by which the original runtime means "see raw_audio"


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of a ChatML file."""
    return read_items(path, json_items(path), options, build)


def build(raw: Any, reading: Reading) -> Sample | None:
    """Build one sample from its JSON value or its table row."""
    entry = object_of(raw, reading)
    if entry is None:
        return None
    check_keys(entry, SAMPLE_KEYS, "", reading)
    if entry.get("audios") is not None:
        reading.report(
            "audios", "belongs to the swift format, but this sample is read as chatml; remove it or change --format"
        )
    messages = messages_of(entry.get("messages"), DIALECT, reading)
    if not messages:
        return None
    start_index = start_index_of(entry.get("start_index"), len(messages), reading)
    speaker, language = speaker_and_language(entry, reading)
    return Sample(messages, start_index, speaker, reading.source, language)


def speaker_and_language(entry: dict[str, Any], reading: Reading) -> tuple[str | None, str | None]:
    """Return the speaker and the language of a sample; where one is not given, `misc` is read instead."""
    misc = entry.get("misc")
    if misc is not None and not isinstance(misc, dict):
        reading.report("misc", f"must be an object, but is {kind_of(misc)}")
    found = {}
    for key in ("speaker", "language"):
        holder = entry if entry.get(key) is not None or not isinstance(misc, dict) else misc
        found[key] = name_of(holder, (key,), reading)
    return found["speaker"], found["language"]


def _clip(raw: dict[str, Any], where: str, reading: Reading) -> AudioClip | None:
    num_faults = len(reading.faults)
    url, data = raw.get("audio_url"), None
    if raw.get("raw_audio") and (url is None or url in NO_URL):
        path: Path | None = reading.manifest
        data = bytes_of(raw["raw_audio"], f"{where}.raw_audio", reading)
    elif url is None and (foreign := next((key for key in ("url", "path", "audio") if raw.get(key)), None)):
        reading.report(
            f"{where}.{foreign}", "belongs to the native format; use audio_url in chatml, or change --format"
        )
        return None
    else:
        path = path_of(url, f"{where}.audio_url", reading)
    offset_s = seconds_of(raw.get("offset"), f"{where}.offset", reading, allow_zero=True)
    duration_s = seconds_of(raw.get("duration"), f"{where}.duration", reading, allow_zero=False)
    if path is None or len(reading.faults) > num_faults:
        return None
    return AudioClip(path, offset_s or 0.0, duration_s, data)


DIALECT = Dialect(ROLES, AUDIO_KEYS, _clip, {})
