"""The `native` format: conversations for the chat templates of transformers, as JSON Lines or a JSON array.

{"messages": [{"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
              {"role": "scene", "content": [{"type": "text", "text": "Audio is recorded from a quiet room."}]},
              {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
              {"role": "assistant", "content": [{"type": "audio", "url": "a.wav"}]}]}

A `scene` message comes first or directly after a system message, and becomes part of the system message. The file of an
audio part is given as `url`, `path` or `audio`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.chatml import SAMPLE_KEYS, speaker_and_language
from higgs_ds.data.formats.checks import (
    LAYOUT_TOKENS,
    SCENE_TOKENS,
    Reading,
    check_keys,
    path_of,
    read_items,
    shown,
    start_index_of,
)
from higgs_ds.data.formats.jsonio import json_items
from higgs_ds.data.formats.turns import Dialect, messages_of, object_of
from higgs_ds.data.templates import joined, scene_block
from higgs_ds.model.sample import ROLES, SYSTEM, AudioClip, Message, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

SCENE = "scene"
PLACE_KEYS = ("url", "path", "audio")
AUDIO_KEYS = ("type", *PLACE_KEYS)


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of a file of native conversations."""
    return read_items(path, json_items(path), options, build)


def build(raw: Any, reading: Reading) -> Sample | None:
    """Build one sample from its JSON value."""
    entry = object_of(raw, reading)
    if entry is None:
        return None
    check_keys(entry, SAMPLE_KEYS, "", reading)
    raw_messages = messages_of(entry.get("messages"), DIALECT, reading)
    if not raw_messages:
        return None
    start_index = start_index_of(entry.get("start_index"), len(raw_messages), reading)
    if any(message.recipient for message in raw_messages):
        reading.report(
            "messages",
            "the native format has no recipient (its chat template would drop it); remove it or use the chatml format",
        )
    messages, new_indices = _merge_scenes(raw_messages, reading)
    speaker, language = speaker_and_language(entry, reading)
    return Sample(messages, new_indices[start_index], speaker, reading.source, language)


def _merge_scenes(raw_messages: tuple[Message, ...], reading: Reading) -> tuple[tuple[Message, ...], list[int]]:
    """Move each scene into the system message, as the chat template does; return the messages and their new indices."""
    messages: list[Message] = []
    new_indices = []
    for turn, message in enumerate(raw_messages):
        # The chat template passes the whole text to the tokenizer at once, so adjacent texts must become one text.
        message = replace(message, parts=joined(message.parts))
        before = raw_messages[turn - 1].role if turn else SYSTEM
        if message.role != SCENE:
            messages.append(message)
        elif before != SYSTEM:
            reading.report(f"messages[{turn}].role", "a scene must come first or directly after a system message")
        elif turn == 0:
            messages.append(Message(SYSTEM, scene_block(message.parts)))
        else:
            parts = joined((*messages[-1].parts, "\n\n", *scene_block(message.parts)))
            messages[-1] = Message(SYSTEM, parts)
        new_indices.append(len(messages) - (message.role != SCENE or turn == 0))
    return tuple(messages), [min(index, len(messages) - 1) for index in new_indices]


def _clip(raw: dict[str, Any], where: str, reading: Reading) -> AudioClip | None:
    given = [key for key in PLACE_KEYS if raw.get(key) is not None]
    if len(given) != 1:
        foreign = next((key for key in ("audio_url", "raw_audio") if raw.get(key)), None)
        found = ", ".join(given) or (
            f"{foreign}, which belongs to the chatml format (see --format)" if foreign else "none"
        )
        reading.report(where, f"must give an audio file in exactly one of {', '.join(PLACE_KEYS)}, but has {found}")
        return None
    if not isinstance(raw[given[0]], str):
        reading.report(f"{where}.{given[0]}", f"must be the path of an audio file, but is {shown(raw[given[0]])}")
        return None
    path = path_of(raw[given[0]], f"{where}.{given[0]}", reading)
    return None if path is None else AudioClip(path)


DIALECT = Dialect((*ROLES, SCENE), AUDIO_KEYS, _clip, {SCENE: LAYOUT_TOKENS + SCENE_TOKENS})
