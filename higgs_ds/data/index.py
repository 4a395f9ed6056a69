"""Checked samples on disk, memory-mapped: a million of them take no more memory than the pages that are read.

A folder of Arrow files, one for each rank that checked a share of the samples, and `index.json`. Rows are in the
manifest's order, whatever the number of ranks was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from higgs_ds.data.audio_codes import KEY_BYTES, CodeCache
from higgs_ds.data.sample import AudioClip, Message, Sample

VERSION = 1  # raise it with every change to what is written
ROWS_PER_BATCH = 1024
DIGEST_BYTES = 16
DESCRIPTION = "index.json"

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # of the sample in its manifest, from 0
        ("source", pa.string()),
        ("messages", pa.string()),  # JSON, null for a clip
        ("start_index", pa.int32()),
        ("speaker", pa.string()),
        ("language", pa.string()),
        ("num_tokens", pa.int32()),
        ("digest", pa.binary(DIGEST_BYTES)),  # the same for two samples that are the same to the model
        ("keys", pa.list_(pa.binary(KEY_BYTES))),  # of the clips' codes
        ("num_frames", pa.list_(pa.int32())),
        ("paths", pa.list_(pa.string())),  # of the files that the sample was read from, with size and time of change
        ("sizes", pa.list_(pa.int64())),
        ("mtimes", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class CheckedSample:
    """A sample, and what was found out about its clips."""

    number: int
    sample: Sample
    num_tokens: int
    keys: tuple[str, ...]
    num_frames: tuple[int, ...]
    files: tuple[tuple[str, int, int], ...]  # path, size in bytes, time of change in ns

    def row(self) -> tuple[Any, ...]:
        """Values in the order of SCHEMA."""
        sample = self.sample
        messages = _messages_to_json(sample.messages)
        digest = hashlib.blake2b(repr((messages, sample.start_index, self.keys)).encode(), digest_size=DIGEST_BYTES)
        paths, sizes, mtimes = zip(*self.files, strict=True) if self.files else ((), (), ())
        keys = [bytes.fromhex(key) for key in self.keys]
        return (
            self.number, sample.source, messages, sample.start_index, sample.speaker, sample.language, self.num_tokens,
            digest.digest(), keys, self.num_frames, paths, sizes, mtimes,
        )  # fmt: skip


class PartWriter:
    """Writes one rank's share of an index, a batch of rows at a time."""

    def __init__(self, folder: Path, part: int) -> None:
        self._file = pa.OSFile(str(folder / f"part-{part:05d}.arrow"), "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._rows: list[tuple[Any, ...]] = []

    def add(self, checked: CheckedSample) -> None:
        self._rows.append(checked.row())
        if len(self._rows) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(SCHEMA.types, zip(*self._rows, strict=True), strict=True)
            arrays = [pa.array(values, column_type) for column_type, values in columns]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._rows = []


class Index:
    """Random access to the rows of all parts, in the order of the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in _parts(folder)]
        self._table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        self._order = np.argsort(self.column("number"), kind="stable")
        self.num_tokens = self.column("num_tokens")[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def sample(self, row: int) -> tuple[Sample, list[str], list[int]]:
        """A sample, whose clips are named by its source alone, and its clips' keys and frames."""
        values = self._table.slice(self._order[row], 1).to_pylist()[0]
        clip = AudioClip(Path(values["source"]))
        messages = _messages_from_json(values["messages"], clip)
        sample = Sample(messages, values["start_index"], values["speaker"], values["source"], values["language"])
        return sample, [key.hex() for key in values["keys"]], values["num_frames"]

    def sources(self, rows: Iterable[int]) -> list[str]:
        return [self._table["source"][int(self._order[row])].as_py() for row in rows]

    def labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of words (speaker, language): for each row the number of its word, -1 for none, and the words."""
        column = self._table[name].take(pa.array(self._order)).combine_chunks().dictionary_encode()
        return column.indices.fill_null(-1).to_numpy(zero_copy_only=False), column.dictionary.to_pylist()

    def digests(self) -> np.ndarray:
        """16 bytes for each row that tell whether two samples are the same to the model."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], f"V{DIGEST_BYTES}", len(chunk), chunk.offset * DIGEST_BYTES)
            for chunk in self._table["digest"].chunks
        ]
        return np.concatenate(chunks)[self._order]

    def clip_frames(self) -> np.ndarray:
        """Frames of all clips of all rows."""
        return self._table["num_frames"].combine_chunks().flatten().to_numpy()

    def is_fresh(self, cache: CodeCache, num_codebooks: int, share: int, num_shares: int) -> bool:
        """Whether every file of a share of the rows is as it was, and the codes of its clips are in the cache."""
        batches = itertools.islice(_batches(self.folder), share, None, num_shares)
        return all(_row_is_fresh(row, cache, num_codebooks) for batch in batches for row in batch.to_pylist())

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, in the order of the files."""
        return self._table[name].to_numpy()


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.arrow"))


def _batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of an index that tell whether it is fresh, read and not mapped: all pages would stay in memory."""
    fields = [SCHEMA.get_field_index(name) for name in ("keys", "num_frames", "paths", "sizes", "mtimes")]
    for path in _parts(folder):
        with pa.OSFile(str(path)) as file:
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _row_is_fresh(row: dict[str, Any], cache: CodeCache, num_codebooks: int) -> bool:
    stamps = zip(row["paths"], row["sizes"], row["mtimes"], strict=True)
    codes = zip(row["keys"], row["num_frames"], strict=True)
    return all(stamp_of(path) == (size, mtime) for path, size, mtime in stamps) and all(
        cache.seems_whole(key.hex(), frames, num_codebooks) for key, frames in codes
    )


def stamp_of(path: str) -> tuple[int, int] | None:
    """Size and time of change of a file, or None where there is none."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _messages_to_json(messages: Sequence[Message]) -> str:
    values = [[m.role, m.recipient, [part if isinstance(part, str) else None for part in m.parts]] for m in messages]
    return json.dumps(values, ensure_ascii=False)


def _messages_from_json(text: str, clip: AudioClip) -> tuple[Message, ...]:
    return tuple(
        Message(role, tuple(clip if part is None else part for part in parts), recipient)
        for role, recipient, parts in json.loads(text)
    )
