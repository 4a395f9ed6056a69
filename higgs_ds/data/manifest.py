"""ChatML manifests, JSONL or a JSON array, read into samples with every fault named by file and line. No torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.sample import ASSISTANT, ROLES, AudioClip, Message, Sample

SAMPLE_KEYS = ("messages", "start_index", "speaker", "misc")
MESSAGE_KEYS = ("role", "content", "recipient")
PART_KEYS = {
    "text": ("type", "text"),
    "audio": ("type", "audio_url", "raw_audio", "offset", "duration", "row_id"),
}
# The layout puts these itself; in a text they would be taken for audio, or for the end of a turn.
LAYOUT_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|AUDIO|>", "<|AUDIO_OUT|>", "<|reserved_special_token_6|>",
)  # fmt: skip

Report = Callable[[str, str], None]  # (field, what is wrong with it)


def read_manifest(path: Path, allow_text_targets: bool) -> tuple[list[Sample], list[str]]:
    """Read a manifest; audio paths in it are relative to its folder.

    Returns the good samples and the problems, each with file, line and field. Audio files are not opened here.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read as UTF-8 text: {error}"]
    samples: list[Sample] = []
    problems: list[str] = []
    for line, entry, fault in _entries(text):
        source = f"{path}:{line}"
        faults = [fault] if fault else []
        if not fault:
            sample = _sample(entry, source, path.parent, _reporter(faults))
            if sample is not None and not faults:
                faults.extend(_missing_targets(sample, allow_text_targets))
            if sample is not None and not faults:
                samples.append(sample)
        problems.extend(f"{source}: {fault}" for fault in faults)
    if not samples and not problems:
        problems.append(f"{path}: holds no samples")
    return samples, problems


def _reporter(faults: list[str]) -> Report:
    return lambda field, what: faults.append(f"{field}: {what}")


def _entries(text: str) -> Iterator[tuple[int, Any, str | None]]:
    """Each entry of JSONL or of a JSON array, as (line number, value, fault of its JSON or None)."""
    if text.lstrip()[:1] == "[":
        yield from _array_entries(text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line), None
            except ValueError as error:
                yield number, None, f"not JSON: {error}"


def _array_entries(text: str) -> Iterator[tuple[int, Any, str | None]]:
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    line, counted_to = 1, 0

    def skip_blank(position: int) -> int:
        match = blank.match(text, position)
        return match.end() if match else position

    position = skip_blank(skip_blank(0) + 1)  # behind the bracket
    while text[position : position + 1] != "]":
        line += text.count("\n", counted_to, position)
        counted_to = position
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            yield line, None, f"not JSON: {error}; the rest of the array was not read"
            return
        yield line, value, None
        position = skip_blank(position)
        if text[position : position + 1] == ",":
            position = skip_blank(position + 1)
        elif text[position : position + 1] != "]":
            yield line, None, "not JSON: expected ',' or ']' behind this entry; the rest of the array was not read"
            return


def _sample(entry: Any, source: str, folder: Path, report: Report) -> Sample | None:
    if not isinstance(entry, dict):
        report("sample", f"must be an object with 'messages', is {_kind(entry)}")
        return None
    _check_keys(entry, SAMPLE_KEYS, "", report)
    raw_messages = entry.get("messages")
    if not isinstance(raw_messages, list) or not raw_messages:
        report("messages", f"must be a list of one or more messages, is {_kind(raw_messages)}")
        return None
    messages = tuple(_message(raw, folder, f"messages[{i}]", report) for i, raw in enumerate(raw_messages))
    start_index = entry.get("start_index")
    if start_index is None:
        start_index = 0
    if not _is_int(start_index) or not 0 <= start_index < len(messages):
        report("start_index", f"must be from 0 to {len(messages) - 1}, the index of a message, is {start_index!r}")
        return None
    return Sample(messages, start_index, _speaker(entry, report), source)


def _missing_targets(sample: Sample, allow_text_targets: bool) -> list[str]:
    if not any(sample.is_target(turn) for turn in range(len(sample.messages))):
        return [f"messages: no assistant message at or after start_index {sample.start_index}: nothing to learn"]
    if not sample.has_target_audio and not allow_text_targets:
        return [
            "messages: no target audio: no assistant message to be learned holds any "
            "(pass --allow_text_targets where the text itself is the target)"
        ]
    return []


def _speaker(entry: dict[str, Any], report: Report) -> str | None:
    misc = entry.get("misc")
    if misc is not None and not isinstance(misc, dict):
        report("misc", f"must be an object, is {_kind(misc)}")
        misc = None
    speaker = entry.get("speaker")
    if speaker is None and misc:
        speaker = misc.get("speaker")
    if speaker is not None and not isinstance(speaker, str):
        report("speaker", f"must be a string, is {_kind(speaker)}")
        return None
    return speaker


def _message(raw: Any, folder: Path, where: str, report: Report) -> Message:
    if not isinstance(raw, dict):
        report(where, f"must be an object with 'role' and 'content', is {_kind(raw)}")
        return Message("", ())
    _check_keys(raw, MESSAGE_KEYS, f"{where}.", report)
    role, recipient = raw.get("role"), raw.get("recipient")
    if role not in ROLES:
        report(f"{where}.role", f"{role!r} is not a role; allowed: {', '.join(ROLES)}")
    if recipient is not None and (not isinstance(recipient, str) or role != ASSISTANT):
        report(f"{where}.recipient", f"must be a string in an assistant message, is {recipient!r} in a {role!r} one")
        recipient = None
    content = raw.get("content")
    raw_parts = content if isinstance(content, list) else [content]
    if not raw_parts:
        report(f"{where}.content", "is empty")
    many = isinstance(content, list)
    parts = []
    for i, raw_part in enumerate(raw_parts):
        part = _part(raw_part, folder, f"{where}.content[{i}]" if many else f"{where}.content", report)
        if part is not None:
            parts.append(part)
    return Message(str(role), tuple(parts), recipient)


def _part(raw: Any, folder: Path, where: str, report: Report) -> str | AudioClip | None:
    if isinstance(raw, str):
        return _text(raw, where, report)
    if not isinstance(raw, dict):
        report(where, f"must be a text, an object with 'type', or a list of these, is {_kind(raw)}")
        return None
    kind = raw.get("type")
    if kind not in PART_KEYS:
        report(f"{where}.type", f"{kind!r} is not a content type; allowed: {', '.join(PART_KEYS)}")
        return None
    _check_keys(raw, PART_KEYS[kind], f"{where}.", report)
    return _text(raw.get("text"), f"{where}.text", report) if kind == "text" else _clip(raw, folder, where, report)


def _text(text: Any, where: str, report: Report) -> str | None:
    if not isinstance(text, str):
        report(where, f"must be a text, is {_kind(text)}")
        return None
    if not text.strip():
        report(where, "is an empty text")
        return None
    for token in LAYOUT_TOKENS:
        if token in text:
            report(where, f"holds {token}, which the prompt layout sets itself")
            return None
    return text


def _clip(raw: dict[str, Any], folder: Path, where: str, report: Report) -> AudioClip | None:
    if raw.get("raw_audio"):
        report(
            f"{where}.raw_audio", "audio inside the manifest is not read; write it to a file and name it in audio_url"
        )
        return None
    url = raw.get("audio_url")
    if not isinstance(url, str) or not url.strip():
        report(f"{where}.audio_url", f"must name an audio file, is {url!r}")
        return None
    offset_s, duration_s = raw.get("offset"), raw.get("duration")
    for name, seconds, lowest in (("offset", offset_s, 0), ("duration", duration_s, None)):
        if seconds is None:
            continue
        if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < float("inf"):
            report(f"{where}.{name}", f"must be seconds, 0 or more, is {seconds!r}")
            return None
        if lowest is None and seconds == 0:
            report(f"{where}.{name}", "is 0 seconds: leave it out for the whole file")
            return None
    return AudioClip(folder / url, float(offset_s or 0), None if duration_s is None else float(duration_s))


def _check_keys(raw: dict[str, Any], known: tuple[str, ...], prefix: str, report: Report) -> None:
    """Report keys that are near misses of known ones; other keys (ids, notes) are the user's own and are let be."""
    for key in raw.keys() - set(known):
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        if near:
            report(f"{prefix}{key}", f"is not a known key; did you mean {near[0]!r}?")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if isinstance(value, dict | list) and not value:
        return "empty"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return names.get(type(value), "a number")
