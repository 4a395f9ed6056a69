"""Detection of the format of training data from its content."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import csv_file, flat, jsonio, metadata, native, swift, table
from higgs_ds.data.formats.checks import printable, shown
from higgs_ds.data.formats.layouts import formats_of_files
from higgs_ds.data.formats.recordings import Columns
from higgs_ds.options.fields import FORMATS, PAIRS

HEAD = 64  # samples or lines that are inspected; the reader then checks all of them
TAR_MAGIC_AT = 257
NO_SAMPLES = "contains no samples"


def recognize(path: Path) -> str:
    """Detect the format of a file or folder, one of `options.fields.FORMATS`.

    Raises:
        InputError: no format, or more than one, was detected. The message says what was found and what to do.
        OSError: the path cannot be read.
    """
    if path.is_dir():
        return _single_format(_formats_of_folder(path), "no audio, Parquet, tar or metadata file")
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return "table"
    if b"\0" in head[:TAR_MAGIC_AT] and head[TAR_MAGIC_AT:].startswith(b"ustar"):
        return "webdataset"
    first = jsonio.first_character(path)
    if not first:
        raise InputError(NO_SAMPLES)
    if first in "[{":
        return _format_of_json(path, first)
    if b"\0" in head:
        raise _undetected("binary data that is not a Parquet file, or text that is not UTF-8")
    return _format_of_lines(path)


def _formats_of_folder(folder: Path) -> dict[str, str]:
    """Return the formats found in a folder, each with the name of the file that it was detected from."""
    found = {}
    if (folder / metadata.FILE_NAME).is_file():
        found["metadata"] = metadata.FILE_NAME
    saved = next((name for name in (table.SAVED, table.SAVED_SPLITS) if (folder / name).is_file()), None)
    if saved:
        found["table"] = saved
    for name in (csv_file.FILE_NAME, flat.FILE_NAME):
        if not found and (folder / name).is_file():
            found[recognize(folder / name)] = name
    # Metadata comes with the files that it describes; without it, these files decide.
    return found or formats_of_files(folder)


def _format_of_json(path: Path, first: str) -> str:
    if first == "{" and _is_metadata(path):
        return "metadata"
    found: dict[str, str] = {}
    others: list[str] = []
    num_invalid = 0
    for item in map(jsonio.parsed, itertools.islice(jsonio.json_items(path), HEAD)):
        format_name = _format_of_value(item.value, first == "[")
        if item.fault:
            num_invalid += 1
        elif format_name:
            found.setdefault(format_name, f"line {item.line}")
        else:
            others.append(_describe(item.value))
    if PAIRS in found:
        raise InputError(
            f"format: has pairs of a chosen and a rejected sample; train on them with --objective dpo --pairs, or give "
            f"--format {PAIRS} to use each sample of them"
        )
    # Conversations without anything specific to ChatML or to the native format give the same samples in both.
    may_be_chatml = found.pop(_CHAT, None) or (num_invalid and not others)
    if not found and may_be_chatml:
        return "chatml"
    if not found and not others:
        raise InputError(NO_SAMPLES)
    return _single_format(found, others[0] if others else "")


def _is_metadata(path: Path) -> bool:
    """Return whether a file is one object with a list of samples. Never loads it whole: it may hold a million."""
    try:
        has_samples, over_lines = jsonio.object_shape(path, "samples")
    except jsonio.InvalidJsonError:
        return False  # JSON Lines with a bad first line, which the reader will report
    if over_lines and not has_samples:
        raise _undetected("one JSON object over several lines (write each sample on one line, or a list of samples)")
    return has_samples


def _format_of_value(value: Any, in_array: bool) -> str | None:
    """Return the format of a JSON sample: `_CHAT` if it may be ChatML or native, None if it is not a sample.

    Args:
        in_array: whether it is in a list, like the samples of metadata.json, and not on a line of its own.
    """
    if not isinstance(value, dict):
        return None
    messages = value.get("messages")
    if not isinstance(messages, list):
        if {"prompt", "chosen", "rejected"} <= value.keys():
            return PAIRS
        if "audio_file" in value and in_array:
            return "metadata"
        return "flat" if isinstance(flat.keys_of(tuple(value)), Columns) else None
    if value.get("audios") is not None or value.get("audio") is not None:
        return "swift"
    for message in messages:
        if not isinstance(message, dict):
            continue
        if message.get("role") == native.SCENE:
            return "native"
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str) and swift.TAG in part:
                return "swift"
            if isinstance(part, dict) and part.get("type") == "audio":
                if part.get("audio_url") or part.get("raw_audio"):
                    return "chatml"
                if any(part.get(key) for key in native.PLACE_KEYS):
                    return "native"
    return _CHAT


def _format_of_lines(path: Path) -> str:
    texts = (line.text.strip("\r\n") for line in jsonio.text_lines(path))
    head = list(itertools.islice(_not_blank(texts), HEAD))
    if csv_file.header_delimiter(head[0]):
        return "csv"
    if 2 * sum("|" in line for line in head) >= len(head):
        return "list"
    raise _undetected(
        f"lines such as {shown(head[0])}, which are not JSON, have no '|', and no header with audio and text columns"
    )


def _not_blank(texts: Iterator[str]) -> Iterator[str]:
    return (text for text in texts if text.strip())


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"JSON objects with the keys {', '.join(shown(key) for key in list(value)[:12]) or 'none'}"
    return f"JSON values such as {shown(value)}"


def _single_format(found: dict[str, str], otherwise: str) -> str:
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise _undetected(otherwise)
    raise _undetected("several formats: " + ", ".join(f"{name} ({printable(where)})" for name, where in found.items()))


def _undetected(found: str) -> InputError:
    return InputError(f"format: cannot be detected; found {found}; set --format to one of {', '.join(FORMATS)}")


_CHAT = "chat"
