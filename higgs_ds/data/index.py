"""Checked samples on disk, memory-mapped: even a million samples take only the memory of the pages that are read.

An index is a folder of Arrow files, three for each rank that checked a share of the samples, and `index.json`. Rows are
in manifest order, whatever the number of ranks was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.recfunctions as rfn
import pyarrow as pa

from higgs_ds.data.code_cache import KEY_BYTES
from higgs_ds.data.quality import CLIP
from higgs_ds.data.references import Candidate, PlainForm
from higgs_ds.data.sample import AudioClip, Message, Sample
from higgs_ds.data.spoken_text import NO_QUALITY, TEXT, SampleQuality

VERSION = 4  # increment it with every change to the files
ROWS_PER_BATCH = 1024
DIGEST_BYTES = 16
DESCRIPTION = "index.json"
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
    ]
)
# Columns that are read when a sample is used, and when an index is compared with the files.
CONTENT = pa.schema(
    [
        ("source", pa.string()),
        ("messages", pa.string()),  # JSON, null for a clip
        ("start_index", pa.int32()),
        ("plain", pa.string()),  # JSON: start_index, the clips that remain, messages; null if there is no reference
        ("keys", pa.list_(pa.binary(KEY_BYTES))),  # of the clips' codes
        ("paths", pa.list_(pa.string())),  # of the files that the sample was read from, with size and modification time
        ("sizes", pa.list_(pa.int64())),
        ("mtimes", pa.list_(pa.int64())),
    ]
)
# Columns that are read for all samples at once where references are left out or drawn: see `Candidate`.
REFERENCES = pa.schema(
    [
        ("plain_tokens", pa.int32()),  # of the sample without its reference; 0 if it has none
        ("pair_tokens", pa.int32()),  # that the sample adds to another as its reference; 0 if it cannot be one
        ("takes", pa.int8()),
        ("words", pa.int64()),
        ("clip", pa.int64()),
        ("file", pa.int64()),
        ("start_s", pa.float64()),
        ("end_s", pa.float64()),
    ]
)
# Columns that are read for all samples at once to find bad ones: arrays of the types CLIP and TEXT.
QUALITY = pa.schema([("clips", pa.binary()), ("text", pa.binary(TEXT.itemsize))])
SCHEMAS = {"facts": FACTS, "content": CONTENT, "references": REFERENCES, "quality": QUALITY}
NO_CANDIDATE = Candidate(0, 0, 0, 0, 0.0, 0.0, False)


@dataclass(frozen=True)
class CheckedClip:
    """The key and number of frames of a clip's codes; the outputs of a Whisper tower for each stretch it encodes."""

    key: str
    num_frames: int
    num_outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckedSample:
    """A sample and the results of checking its clips."""

    number: int
    sample: Sample
    num_tokens: int
    clips: tuple[CheckedClip, ...]
    files: tuple[tuple[str, int, int], ...]  # path, size in bytes, modification time in ns
    plain: PlainForm | None = None
    plain_tokens: int = 0
    candidate: Candidate | None = None
    quality: SampleQuality | None = None

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Return the values for each of the SCHEMAS, in column order."""
        sample = self.sample
        messages = _to_json(sample.messages)
        keys = tuple(clip.key for clip in self.clips)
        num_frames, num_outputs = [clip.num_frames for clip in self.clips], [clip.num_outputs for clip in self.clips]
        identity = repr((messages, sample.start_index, keys)).encode()
        digest = hashlib.blake2b(identity, digest_size=DIGEST_BYTES).digest()
        paths, sizes, mtimes = zip(*self.files, strict=True) if self.files else ((), (), ())
        key_bytes = [bytes.fromhex(key) for key in keys]
        speaker, language = sample.speaker, sample.language
        c = self.candidate or NO_CANDIDATE
        return {
            "facts": (self.number, self.num_tokens, num_frames, num_outputs, speaker, language, digest),
            "content": (
                sample.source, messages, sample.start_index, _plain_to_json(self.plain), key_bytes,
                paths, sizes, mtimes,
            ),
            "references": (self.plain_tokens, c.num_tokens, int(c.takes), c.words, c.clip, c.file, c.start_s, c.end_s),
            "quality": self.quality.row() if self.quality else NO_QUALITY,
        }  # fmt: skip


class PartWriter:
    """Writes one rank's part of an index, in batches of rows."""

    def __init__(self, folder: Path, part: int) -> None:
        self._files = {kind: pa.OSFile(str(folder / f"{kind}-{part:05d}.arrow"), "wb") for kind in SCHEMAS}
        self._writers = {kind: pa.ipc.new_file(self._files[kind], schema) for kind, schema in SCHEMAS.items()}
        self._rows: list[dict[str, tuple[Any, ...]]] = []

    def add(self, checked: CheckedSample) -> None:
        self._rows.append(checked.rows())
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        for kind in SCHEMAS:
            self._writers[kind].close()
            self._files[kind].close()

    def _flush(self) -> None:
        for kind, schema in SCHEMAS.items() if self._rows else ():
            columns = zip(*(row[kind] for row in self._rows), strict=True)
            arrays = [pa.array(values, data_type) for data_type, values in zip(schema.types, columns, strict=True)]
            self._writers[kind].write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        self._rows = []


class Index:
    """Random access to the rows of all parts, in manifest order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts, self._content, self._references, _ = (_mapped(folder, kind) for kind in SCHEMAS)
        self._order = np.argsort(_numbers(self._facts["number"].combine_chunks()), kind="stable")
        self.num_tokens = _numbers(self._facts["num_tokens"].combine_chunks())[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def sample(self, row: int, without_reference: bool = False) -> tuple[Sample, list[CheckedClip]]:
        """Return a sample and the properties of its clips. The path of each clip is just the sample's source."""
        at = int(self._order[row])
        content, facts = (table.slice(at, 1).to_pylist()[0] for table in (self._content, self._facts))
        messages = _messages_of(json.loads(content["messages"]), AudioClip(Path(content["source"])))
        sample = Sample(messages, content["start_index"], facts["speaker"], content["source"], facts["language"])
        clips = _clips_of(content | facts)
        if without_reference and content["plain"] is not None:
            start_index, kept, values = json.loads(content["plain"])
            messages = _messages_of(values, AudioClip(Path(content["source"])))
            return replace(sample, messages=messages, start_index=start_index), [clips[number] for number in kept]
        return sample, clips

    def sources(self, rows: Iterable[int]) -> list[str]:
        return [self._content["source"][int(self._order[row])].as_py() for row in rows]

    def labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a column of strings (speaker, language): the index of each row's string, -1 for none; the strings.

        The strings are in the order in which they first appear.
        """
        stored: dict[str | None, int] = {None: -1}
        codes = [
            np.array([stored.setdefault(value, len(stored) - 1) for value in chunk.to_pylist()], np.int32)
            for chunk in self._facts[name].chunks
        ]
        in_order = np.concatenate([np.zeros(0, np.int32), *codes])[self._order]
        found, first = np.unique(in_order, return_index=True)
        by_appearance = [code for code in found[np.argsort(first)].tolist() if code >= 0]
        renumbered = np.full(len(stored), -1, np.int32)  # the last place is that of code -1
        renumbered[by_appearance] = np.arange(len(by_appearance))
        strings = [value for value in stored if value is not None]
        return renumbered[in_order], [strings[code] for code in by_appearance]

    def voices(self) -> np.ndarray:
        """Return the number of each row's speaker, -1 for none."""
        return self.labels("speaker")[0]

    def reference_column(self, name: str) -> np.ndarray:
        """Return a column of REFERENCES, in manifest order."""
        return _numbers(self._references[name].combine_chunks())[self._order]

    def any_heard(self) -> bool:
        """Return whether a Whisper tower encodes any of the clips."""
        chunks = self._facts["num_outputs"].chunks
        return any(len(outputs) for chunk in chunks for lists in chunk.to_pylist() for outputs in lists)

    def digests(self) -> np.ndarray:
        """Return 16 bytes per row, equal for two samples that are the same to the model."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], f"V{DIGEST_BYTES}", len(chunk), chunk.offset * DIGEST_BYTES)
            for chunk in self._facts["digest"].chunks
        ]
        return np.concatenate(chunks)[self._order]

    def text_quality(self, *names: str) -> np.ndarray:
        """Return some fields of TEXT of all rows, read from disk."""
        batches = [_values(batch["text"], TEXT)[[*names]] for batch in _read(self._folder, "quality")]
        return rfn.repack_fields(np.concatenate([np.zeros(0, TEXT)[[*names]], *batches])[self._order])

    def clip_quality(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield measurements of clips, arrays of the type CLIP; the row of each, and its number in that row. A batch
        has all clips of its rows, which are not in order."""
        row_of = np.empty_like(self._order)
        row_of[self._order] = np.arange(len(self._order))
        start = 0
        for batch in _read(self._folder, "quality"):
            counts = np.array([len(value) for value in batch["clips"].to_pylist()]) // CLIP.itemsize
            rows = row_of[start : start + len(batch)]
            numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield _values(batch["clips"], CLIP), np.repeat(rows, counts), numbers
            start += len(batch)

    def clip_frames(self) -> np.ndarray:
        """Return the numbers of frames of all clips of all rows."""
        lists = self._facts["num_frames"].combine_chunks()
        bounds = _numbers(lists.offsets)
        return _numbers(lists.values)[bounds[0] : bounds[-1]]

    def num_frames(self) -> np.ndarray:
        """Return the number of frames of all clips of each row."""
        lists = self._facts["num_frames"].combine_chunks()
        bounds, ends = _numbers(lists.offsets), np.cumsum(_numbers(lists.values), dtype=np.int64)
        return np.diff(np.concatenate([[0], ends])[bounds])[self._order]

    def is_fresh(self, is_kept: Callable[[CheckedClip], bool], share: int, num_shares: int) -> bool:
        """Return whether, in a share of the rows, all files are unchanged and the data of all clips is still stored."""
        start = 0
        for number, batch in enumerate(_read(self._folder, "content")):
            facts = self._facts.select(["num_frames", "num_outputs"]).slice(start, len(batch))
            start += len(batch)
            if number % num_shares == share:
                rows = zip(batch.to_pylist(), facts.to_pylist(), strict=True)
                if not all(_row_is_fresh(row | facts, is_kept) for row, facts in rows):
                    return False
        return True


def open_kept(folder: Path) -> Index | None:
    """Open an index that an earlier run has kept. Return None if its files are missing or damaged."""
    try:
        return Index(folder)
    except (OSError, pa.ArrowInvalid):
        return None


def _row_is_fresh(row: dict[str, Any], is_kept: Callable[[CheckedClip], bool]) -> bool:
    stamps = zip(row["paths"], row["sizes"], row["mtimes"], strict=True)
    return all(stamp_of(path) == (size, mtime) for path, size, mtime in stamps) and all(map(is_kept, _clips_of(row)))


def _clips_of(row: dict[str, Any]) -> list[CheckedClip]:
    columns = zip(row["keys"], row["num_frames"], row["num_outputs"], strict=True)
    return [CheckedClip(key.hex(), num_frames, tuple(outputs)) for key, num_frames, outputs in columns]


def _files(folder: Path, kind: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{kind}-*.arrow"))]


def _read(folder: Path, kind: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all parts in batches, with one batch in memory at a time."""
    for path in _files(folder, kind):
        with pa.OSFile(path) as file:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _mapped(folder: Path, kind: str) -> pa.Table:
    """Return the rows of all parts, concatenated. They are read from disk on access."""
    files = _files(folder, kind)
    if not files:
        raise FileNotFoundError(f"{folder}: has no {kind}; the cache was deleted while it was in use")
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(path)).read_all() for path in files])


def _values(column: pa.Array, dtype: np.dtype) -> np.ndarray:
    """Return the values of a whole column of bytes as a structured array."""
    return np.frombuffer(column.buffers()[-1] or b"", dtype)


def _numbers(column: pa.Array) -> np.ndarray:
    """Return a column without nulls. pyarrow's `to_numpy` would import pandas, and `flatten` its compute functions."""
    return np.from_dlpack(column)


def stamp_of(path: str) -> tuple[int, int] | None:
    """Return size and modification time of a file, or None if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _to_json(messages: Sequence[Message], *before: Any) -> str:
    values = [[m.role, m.recipient, [part if isinstance(part, str) else None for part in m.parts]] for m in messages]
    return json.dumps([*before, values] if before else values, ensure_ascii=False)


def _plain_to_json(plain: PlainForm | None) -> str | None:
    return None if plain is None else _to_json(plain.messages, plain.start_index, plain.clips)


def _messages_of(values: list[Any], clip: AudioClip) -> tuple[Message, ...]:
    return tuple(
        Message(role, tuple(clip if part is None else part for part in parts), recipient)
        for role, recipient, parts in values
    )
