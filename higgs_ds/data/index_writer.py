"""Write an index of checked samples: the columns of its files, and what a row has in each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from higgs_ds.data.code_cache import KEY_BYTES
from higgs_ds.data.references import PlainForm, number_of
from higgs_ds.data.speaker_prompts import prompt_number
from higgs_ds.data.spoken_text import NO_QUALITY, TEXT, SampleQuality
from higgs_ds.model.sample import Message, Sample

VERSION = 5  # increment it with every change to the files
ROWS_PER_BATCH = 1024
DIGEST_BYTES = 16
DESCRIPTION = "index.json"
FILE_NAME = "{}-{:05d}.arrow"  # kind and part
# Columns that are read for all samples at once. They are small, and in separate files, since reading a value also maps
# the pages around it.
FACTS = pa.schema(
    [
        ("number", pa.int64()),  # of the sample in its manifest, from 0
        ("num_tokens", pa.int32()),
        ("num_frames", pa.list_(pa.int32())),  # of each clip
        ("num_outputs", pa.list_(pa.list_(pa.int32()))),  # of a Whisper tower: per clip, per stretch it encodes
        ("speaker", pa.string()),
        ("language", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),  # equal for two samples that are the same to the model
        ("prompt", pa.int64()),  # equal for two samples whose prompts differ at most in the words to speak
    ]
)
# Columns that are read when a sample is used.
CONTENT = pa.schema(
    [
        ("source", pa.string()),
        ("messages", pa.string()),  # JSON, null for a clip
        ("start_index", pa.int32()),
        ("plain", pa.string()),  # JSON: start_index, the clips that remain, messages; null if there is no reference
        ("keys", pa.list_(pa.binary(KEY_BYTES))),  # of the clips' codes
        ("last_file", pa.int64()),  # of the last clip: a number for its file, null for audio in the manifest
        ("last_start_s", pa.float64()),  # of the last clip in its file
        ("last_clip_s", pa.float64()),  # its duration, before its ends are trimmed
    ]
)
# Columns that are read for all samples at once to find bad ones: arrays of the types CLIP and TEXT.
QUALITY = pa.schema([("clips", pa.binary()), ("text", pa.binary(TEXT.itemsize))])
# What an index is compared with, nearly without repetitions: a file is read for many samples, a clip may be used again.
FILES = pa.schema([("path", pa.string()), ("size", pa.int64()), ("mtime", pa.int64())])  # except the manifest
CLIPS = pa.schema([("key", pa.binary(KEY_BYTES)), ("num_frames", pa.int32()), ("num_outputs", pa.list_(pa.int32()))])
SCHEMAS = {"facts": FACTS, "content": CONTENT, "quality": QUALITY, "files": FILES, "clips": CLIPS}
REMEMBERED = 1 << 14  # files and clips that are not written again


@dataclass(frozen=True)
class CheckedClip:
    """The key and number of frames of a clip's codes; the outputs of a Whisper tower for each stretch it encodes."""

    key: str
    num_frames: int
    num_outputs: tuple[int, ...] = ()


class CheckedSample(NamedTuple):
    """A sample and the results of checking its clips."""

    number: int
    sample: Sample
    num_tokens: int
    clips: tuple[CheckedClip, ...]
    files: tuple[tuple[str, int, int], ...]  # path, size in bytes, modification time in ns
    plain: PlainForm | None = None
    last_clip_s: float = 0.0  # duration of the last clip, before its ends are trimmed
    quality: SampleQuality | None = None

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Return the values for FACTS and CONTENT, in column order."""
        sample = self.sample
        messages = _to_json(sample.messages)
        keys = tuple(clip.key for clip in self.clips)
        num_frames, num_outputs = [clip.num_frames for clip in self.clips], [clip.num_outputs for clip in self.clips]
        identity = repr((messages, sample.start_index, keys)).encode()
        digest = hashlib.blake2b(identity, digest_size=DIGEST_BYTES).digest()
        key_bytes = [bytes.fromhex(key) for key in keys]
        speaker, language = sample.speaker, sample.language
        last = sample.clips[-1] if self.clips else None
        last_file = None if last is None or last.data is not None else number_of(str(last.path))
        return {
            "facts": (
                self.number, self.num_tokens, num_frames, num_outputs, speaker, language, digest,
                prompt_number(sample, keys),
            ),
            "content": (
                sample.source, messages, sample.start_index, _plain_to_json(self.plain), key_bytes,
                last_file, last.offset_s if last else None, self.last_clip_s,
            ),
            "quality": self.quality.row() if self.quality else NO_QUALITY,
        }  # fmt: skip


class PartWriter:
    """Writes one rank's part of an index, in batches of rows."""

    def __init__(self, folder: Path, part: int) -> None:
        self._tables = {kind: TableWriter(folder / FILE_NAME.format(kind, part), SCHEMAS[kind]) for kind in SCHEMAS}
        self._remembered: set[tuple[str, int, int] | CheckedClip] = set()

    def add(self, checked: CheckedSample) -> None:
        for kind, row in checked.rows().items():
            self._tables[kind].add(row)
        for file in checked.files:
            if self._is_new(file):
                self._tables["files"].add(file)
        for clip in checked.clips:
            if self._is_new(clip):
                self._tables["clips"].add((bytes.fromhex(clip.key), clip.num_frames, clip.num_outputs))

    def close(self) -> None:
        for table in self._tables.values():
            table.close()

    def _is_new(self, value: tuple[str, int, int] | CheckedClip) -> bool:
        if value in self._remembered:
            return False
        if len(self._remembered) == REMEMBERED:
            self._remembered.clear()
        self._remembered.add(value)
        return True


class TableWriter:
    """Writes a file of an index, in batches of rows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self._rows: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        """Add a row of values in column order."""
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(self._schema.types, zip(*self._rows, strict=True), strict=True)
            arrays = [pa.array(values, data_type) for data_type, values in columns]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
            self._rows = []


_ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` makes a new one each time


def _to_json(messages: Sequence[Message], *before: Any) -> str:
    values = [[m.role, m.recipient, [part if isinstance(part, str) else None for part in m.parts]] for m in messages]
    return _ENCODER.encode([*before, values] if before else values)


def _plain_to_json(plain: PlainForm | None) -> str | None:
    return None if plain is None else _to_json(plain.messages, plain.start_index, plain.clips)
