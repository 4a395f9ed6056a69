"""The `webdataset` format: shards, which are tar files, read where they are: nothing is extracted.

000001.flac  000001.json    {"text": "Good morning.", "speaker": "anna", "language": "en"}
000002.flac  000002.txt     Good evening.

Members with the same name up to the first dot are one sample, as in webdataset, and must follow each other: webdataset
would make several samples of them. The text is in a `.txt` member, or in a `.json` member under a key of the `flat`
format, like speaker and language. A shard is read in one pass, and one sample of it is in memory at a time.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from higgs_ds.data.formats import flat
from higgs_ds.data.formats.checks import Reading, build_entry, kind_of, printable, shown
from higgs_ds.data.formats.folders import list_files
from higgs_ds.data.formats.recordings import AUDIO_COLUMNS, AUDIO_SUFFIXES, LONGEST_TRANSCRIPT, TEXT_COLUMNS
from higgs_ds.data.formats.splits import split_fault
from higgs_ds.model.sample import Entry, Sample
from higgs_ds.options.train import DataOptions

SUFFIX = ".tar"
AUDIO, TEXT, JSON = "audio", "text", "json"
NORMALIZED = "normalized.txt"  # the one of LibriTTS's two texts that is used
LONGEST_MEMBER = 1 << 28  # bytes
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # webdataset's key and extension
_IGNORED = re.compile(r"__[^/]*__(/|$)")


class ShardError(Exception):
    """A shard that cannot be read further."""


@dataclass
class _Group:
    """Neighbouring members of one sample: their contents by kind and extension, and their faults."""

    key: str
    members: dict[str, dict[str, bytes]] = field(default_factory=lambda: {AUDIO: {}, TEXT: {}, JSON: {}})
    faults: list[str] = field(default_factory=list)


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield the entries of a shard, or of a folder of shards; `source` names the shard and the sample's key."""
    files, faults = list_files(path, (SUFFIX,)) if path.is_dir() else ([path], [])
    yield from faults
    fault = split_fault(path, files) if path.is_dir() else ""
    if fault:
        yield Entry(printable(path), None, (printable(fault),))
        return
    for file in files:
        yield from _read_shard(file, options)


def _read_shard(path: Path, options: DataOptions) -> Iterator[Entry]:
    key, seen = "", set[str]()
    try:
        with tarfile.open(path, "r:") as tar:
            for group in _groups(tar):
                source = f"{printable(path)}:{printable(group.key)}"
                if group.key in seen:
                    group.faults.append(
                        "key: members of this sample come earlier in the shard, with others between them; write the "
                        "members of a sample one after the other"
                    )
                seen.add(group.key)
                key = group.key
                if group.faults:
                    yield Entry(source, None, tuple(map(printable, group.faults)))
                elif any(group.members.values()):
                    yield build_entry(group.members, Reading(path, source, options), _build)
    # tarfile raises most of these for a damaged header, depending on what it holds
    except (ShardError, tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        what = str(error) or type(error).__name__
        after = f" after sample {shown(key)}" if key else ""
        fault = f"shard: cannot be read as an uncompressed tar file{after}: {printable(what)}"
        yield Entry(printable(path), None, (fault,))


def _groups(tar: tarfile.TarFile) -> Iterator[_Group]:
    group = _Group("")
    for member in _members(tar):
        match = _NAME.fullmatch(member.name)
        if match is None or _IGNORED.match(member.name) or member.isdir():
            continue
        if match[1] != group.key:
            yield group
            group = _Group(match[1])
        _add(group, match[2].lower(), member, tar)
    yield group


def _add(group: _Group, extension: str, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
    """Read a member into its group, unless its extension is not one of those that are used."""
    suffix = f".{extension.rpartition('.')[2]}"
    kind = AUDIO if suffix in AUDIO_SUFFIXES else {".txt": TEXT, ".json": JSON}.get(suffix)
    longest = LONGEST_MEMBER if kind == AUDIO else LONGEST_TRANSCRIPT
    if not member.isreg():
        group.faults.append(f"{extension}: is a link or a device; write the file itself into the shard")
    elif kind and extension in group.members[kind]:
        group.faults.append(f"{extension}: there are two such members with this key; webdataset stops at the second")
    elif kind and member.size > longest:
        group.faults.append(f"{extension}: has {member.size} bytes; the limit is {longest}")
    elif kind == AUDIO and not member.size:
        group.faults.append(f"{extension}: is empty")
    elif kind:
        file = tar.extractfile(member)
        assert file is not None
        group.members[kind][extension] = file.read()


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file up to its end. Raises ShardError where tarfile takes a damaged header for it."""
    place = -1
    while (member := tar.next()) is not None:
        if member.offset <= place:
            raise ShardError(f"the header at byte {place} is damaged")
        place = member.offset
        tar.members = []  # type: ignore[attr-defined]  # else it keeps every header that it has read
        yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise ShardError(f"the header at byte {tar.offset} is damaged" if block else "it ends before its end mark")


def _build(members: Any, reading: Reading) -> Sample | None:
    audio = _only(members[AUDIO], "audio", reading)
    text = members[TEXT].get(NORMALIZED) or _only(members[TEXT], "text", reading, is_needed=not members[JSON])
    described = _only(members[JSON], "JSON", reading, is_needed=False)
    raw = {} if described is None else _json(described, reading)
    if audio is None or raw is None or reading.faults:
        return None
    kept = {key: value for key, value in raw.items() if key.strip().casefold() not in _ignored_keys(text)}
    kept["audio"] = {"bytes": audio}
    if text is not None:
        kept["text"] = text.decode("utf-8-sig", "surrogateescape")
    return flat.build(kept, reading)


def _ignored_keys(text: bytes | None) -> tuple[str, ...]:
    """Return the keys of a JSON member that do not count: the audio and the text are members of their own."""
    return (*AUDIO_COLUMNS, "offset", "duration", *(TEXT_COLUMNS if text is not None else ()))


def _only(found: dict[str, bytes], kind: str, reading: Reading, is_needed: bool = True) -> bytes | None:
    if len(found) > 1:
        names = ", ".join(f".{extension}" for extension in found)
        reading.report("key", f"has several members with {kind}: {names}; a key ends at the first dot of a name")
    elif not found and is_needed:
        what = ", ".join(AUDIO_SUFFIXES) if kind == "audio" else ".txt or .json"
        reading.report("key", f"has no member with {kind} ({what}) beside the others; write them one after the other")
    return next(iter(found.values())) if len(found) == 1 else None


def _json(data: bytes, reading: Reading) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        reading.report("json", f"is not JSON: {error}")
        return None
    if not isinstance(value, dict):
        reading.report("json", f"must be an object, but is {kind_of(value)}")
        return None
    return value
