"""Checks that all readers share: texts, names, paths, numbers, keys, and that a sample has a training target."""

from __future__ import annotations

import base64
import difflib
import functools
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.jsonio import Item, Line, is_utf8, parsed
from higgs_ds.data.normalize import normalize_text
from higgs_ds.data.templates import joined
from higgs_ds.model.sample import ASSISTANT, USER, Entry, Message, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

# The prompt layout adds these tokens itself. Inside a text they would be read as audio or as the end of a turn.
LAYOUT_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|audio_bos|>", "<|audio_eos|>", "<|audio_out_bos|>", "<|AUDIO|>", "<|AUDIO_OUT|>", "<|reserved_special_token_6|>",
)  # fmt: skip
SCENE_TOKENS = ("<|scene_desc_start|>", "<|scene_desc_end|>")
LONGEST_KEY = 40  # longer keys are not treated as misspellings
# `relative:x.wav` is a file name, `s3://...` and `data:...` are not.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


@dataclass
class Reading:
    """One sample while it is read: its location, the options, its faults, and the text files it is read from."""

    manifest: Path
    source: str
    options: DataOptions
    faults: list[str] = field(default_factory=list)
    text_files: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The folder that audio paths are relative to."""
        return self.manifest.parent

    def report(self, where: str, what: str) -> None:
        self.faults.append(f"{where}: {what}")


Build = Callable[[Any, Reading], Sample | None]


def read_items(path: Path, items: Iterable[Item | Line], options: DataOptions, build: Build) -> Iterator[PendingEntry]:
    """Yield an entry for each of the `items` of a file."""
    entry_of = functools.partial(_entry_of, path, printable(path), options, build)
    return (functools.partial(entry_of, item) for item in items)


def _entry_of(path: Path, shown_path: str, options: DataOptions, build: Build, raw: Item | Line) -> Entry:
    item = parsed(raw)
    source = f"{shown_path}:{item.line}"
    if item.fault:
        return Entry(source, None, (item.fault,))
    return build_entry(item.value, Reading(path, source, options), build)


def build_entry(raw: Any, reading: Reading, build: Build) -> Entry:
    """Return the entry of a raw value: the sample that `build` returns, normalized and checked, or all its faults."""
    sample = build(raw, reading)
    if sample is not None and not reading.faults and reading.options.normalize_text:
        sample = replace(sample, messages=_normalize_spoken_texts(sample.messages, reading))
    if sample is not None and not reading.faults:
        _check_targets(sample, reading)
    return Entry(reading.source, None if reading.faults else sample, tuple(reading.faults))


def _normalize_spoken_texts(messages: tuple[Message, ...], reading: Reading) -> tuple[Message, ...]:
    """Return the messages with their spoken texts normalized: those of user turns that are followed by speech."""
    spoken = []
    for turn, (message, answer) in enumerate(zip(messages, [*messages[1:], None], strict=True)):
        if message.role == USER and answer is not None and answer.role == ASSISTANT and answer.clips:
            parts = joined(message.parts)
            parts = tuple(normalize_text(part) if isinstance(part, str) else part for part in parts)
            if "" in parts:
                reading.report(
                    f"messages[{turn}]",
                    "has a text that is empty after --normalize_text; change the text or remove the sample",
                )
            message = replace(message, parts=parts)
        spoken.append(message)
    return tuple(spoken)


def _check_targets(sample: Sample, reading: Reading) -> None:
    if sample.has_target_audio:
        return
    if not any(sample.is_target(turn) for turn in range(len(sample.messages))):
        reading.report(
            "messages",
            f"no assistant message at or after start_index {sample.start_index}, so there is nothing to train on; "
            "add one, or lower start_index",
        )
    elif not reading.options.allow_text_targets:
        reading.report(
            "messages",
            "no target audio: none of the assistant messages to train on contains audio; add audio, or pass "
            "--allow_text_targets to train on the text itself",
        )


def text_of(
    text: Any, where: str, reading: Reading, forbidden: tuple[str, ...] = LAYOUT_TOKENS, allow_blank: bool = False
) -> str | None:
    """Return a text if it is a non-blank string, valid UTF-8 and free of `forbidden` tokens; else report it."""
    if not isinstance(text, str):
        reading.report(where, f"must be a string, but is {kind_of(text)}")
    elif not text.strip() and not allow_blank:
        reading.report(where, "is empty or blank; fill in the text or remove the sample")
    elif not is_utf8(text):
        reading.report(
            where,
            f"{shown(text)} is not UTF-8: it contains half of a surrogate pair, or bytes in another encoding; correct "
            "the text, or save the file as UTF-8",
        )
    elif "<|" in text and (token := next((token for token in forbidden if token in text), None)):
        reading.report(where, f"contains {token}, which the prompt layout adds itself; remove it from the text")
    else:
        return text
    return None


def scene_text_of(text: Any, where: str, reading: Reading) -> str | None:
    """Return a text that goes inside the scene description, where the scene tokens are forbidden too."""
    return text_of(text, where, reading, LAYOUT_TOKENS + SCENE_TOKENS)


def path_of(name: Any, where: str, reading: Reading) -> Path | None:
    """Return the path of a file given relative to the manifest's folder."""
    if not isinstance(name, str) or not name.strip():
        reading.report(where, f"must be the path of a file, but is {shown(name)}")
    elif "\0" in name or not is_utf8(name):
        reading.report(
            where, f"{shown(name)} is not a valid file name: it contains a null character or is not UTF-8; correct it"
        )
    elif _ADDRESS.match(name):
        reading.report(where, f"{shown(name)} is a URL, not a local file; download it and give the path of the file")
    else:
        return _beside(reading.manifest, name)
    return None


@functools.lru_cache(maxsize=4096)  # a recording may have thousands of clips
def _beside(manifest: Path, name: str) -> Path:
    return manifest.parent / name


def name_of(raw: Mapping[str, Any], keys: tuple[str, ...], reading: Reading, allow_numbers: bool = False) -> str | None:
    """Return the value of the first given key: a speaker or a language. A blank value counts as not given."""
    key = next((key for key in keys if raw.get(key) is not None), None)
    if key is None:
        return None
    name = raw[key]
    if allow_numbers and is_int(name):
        name = str(name)
    if not isinstance(name, str):
        reading.report(key, f"must be a string, but is {kind_of(name)}")
        return None
    name = text_of(name.strip(), key, reading, allow_blank=True)
    return name or None


def seconds_of(seconds: Any, where: str, reading: Reading, allow_zero: bool) -> float | None:
    """Return a number of seconds, or None if none is given."""
    if seconds is None:
        return None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < float("inf"):
        reading.report(where, f"must be a number of seconds, 0 or more, but is {shown(seconds)}")
        return None
    if seconds == 0 and not allow_zero:
        reading.report(where, "is 0 seconds; remove it to use the whole file")
        return None
    return float(seconds)


def start_index_of(index: Any, num_messages: int, reading: Reading) -> int:
    """Return the index of the first message that may be trained on; 0 if none is given."""
    if index is None:
        return 0
    if not is_int(index) or not 0 <= index < num_messages:
        reading.report(
            "start_index", f"must be the index of a message, from 0 to {num_messages - 1}, but is {shown(index)}"
        )
        return 0
    return int(index)


def bytes_of(encoded: Any, where: str, reading: Reading) -> bytes | None:
    """Return an audio file stored in the manifest itself: as base64, or in Parquet as plain bytes."""
    if isinstance(encoded, bytes) and encoded:
        return encoded
    if not isinstance(encoded, str):
        reading.report(where, f"must be an audio file in base64, but is {kind_of(encoded)}")
        return None
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except ValueError as error:
        reading.report(where, f"{shown(encoded)} is not base64: {error}; encode the audio file again")
        return None
    if not data:
        reading.report(where, "contains no data; give an audio file in base64")
    return data or None


def check_keys(raw: Mapping[str, Any], known: tuple[str, ...], prefix: str, reading: Reading) -> None:
    """Report keys that look like misspelled known keys. Other keys (ids, notes) belong to the user and are ignored."""
    for key in raw:
        if key not in known and len(key) <= LONGEST_KEY:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.85)
            if near:
                reading.report(f"{prefix}{key}", f"is not a known key; did you mean {near[0]!r}?")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value: Any) -> str:
    """Describe the type of a value in JSON terms."""
    if value is None:
        return "missing"
    if isinstance(value, dict | list) and not value:
        return "empty"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", bytes: "bytes"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """Format a value for a message: shortened, even if it is long or deeply nested, and printable."""
    return printable(_SHORT.repr(value))


def printable(name: Any) -> str:
    """Format a path or name for a message; its bytes need not be UTF-8."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2
