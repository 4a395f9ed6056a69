"""Checked samples on disk, memory-mapped: even a million samples take only the memory of the pages that are read.

An index is a folder of Arrow files, four for each rank that checked a share of the samples, and `index.json`. Rows are
in manifest order, whatever the number of ranks was. `reference_index` adds one file if an option needs it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.recfunctions as rfn
import pyarrow as pa

from higgs_ds.common.errors import InputError
from higgs_ds.common.files import release_freed_memory
from higgs_ds.common.threads import map_in_threads
from higgs_ds.data.index_writer import DIGEST_BYTES, CheckedClip
from higgs_ds.data.quality import CLIP
from higgs_ds.data.references import PlainForm
from higgs_ds.data.spoken_text import TEXT
from higgs_ds.model.sample import AudioClip, Message, Sample

STAT_THREADS = 8  # that wait for a network file system at the same time
Stamp = tuple[int, int]  # size in bytes and modification time in ns of a file
_SOME_CLIP = AudioClip(Path())


class Index:
    """Random access to the rows of all parts, in manifest order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: list[mmap.mmap] = []
        self._facts, self._content = (_mapped(folder, kind, self._maps) for kind in ("facts", "content"))
        self._order = np.argsort(_numbers(self._facts["number"].combine_chunks()), kind="stable")
        self._labels: dict[str, tuple[np.ndarray, list[str]]] = {}
        self.num_tokens = _numbers(self._facts["num_tokens"].combine_chunks())[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def sample(self, row: int, without_reference: bool = False) -> tuple[Sample, list[CheckedClip]]:
        """Return a sample and the properties of its clips. The path of each clip is just the sample's source."""
        at = int(self._order[row])
        content, facts = (table.slice(at, 1).to_pylist()[0] for table in (self._content, self._facts))
        values = content | facts
        sample, clips = sample_of(values), clips_of(values)
        plain = plain_of(values) if without_reference else None
        return (plain.of(sample), [clips[number] for number in plain.clips]) if plain else (sample, clips)

    def turns(self, row: int) -> Sample:
        """Return a sample's messages and its targets, without the rest, several times as fast as `sample`."""
        at = int(self._order[row])
        messages, start_index = (self._content[name][at].as_py() for name in ("messages", "start_index"))
        return Sample(_messages_of(json.loads(messages), _SOME_CLIP), start_index, None, "")

    def release_pages(self) -> None:
        """Give the pages that have been read back to the system, which reads them again where they are needed."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)
        release_freed_memory()

    def sources(self, rows: Iterable[int]) -> list[str]:
        return [self._content["source"][int(self._order[row])].as_py() for row in rows]

    def number(self, row: int) -> int:
        """Return the number of a row's sample in its manifest, where bad samples count too."""
        return self._facts["number"][int(self._order[row])].as_py()

    def labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return a column of strings (speaker, language): the index of each row's string, -1 for none; the strings.

        The strings are in the order in which they first appear.
        """
        if name not in self._labels:
            self._labels[name] = self._read_labels(name)
        return self._labels[name]

    def _read_labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        stored: defaultdict[str | None, int] = defaultdict(count().__next__, {None: -1})
        codes = [
            np.fromiter(map(stored.__getitem__, chunk.to_pylist()), np.int32, len(chunk))
            if chunk.null_count < len(chunk)
            else np.full(len(chunk), -1, np.int32)
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

    def prompts(self) -> np.ndarray:
        """Return numbers that are equal for rows whose prompts differ at most in the words to speak."""
        return _numbers(self._facts["prompt"].combine_chunks())[self._order]

    def reference_column(self, name: str) -> np.ndarray:
        """Return a column of those that `reference_index` has added, in manifest order."""
        return _numbers(_mapped(self.folder, "references", [])[name].combine_chunks())[self._order]

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
        batches = [_values(batch["text"], TEXT)[[*names]] for batch in _read(self.folder, "quality")]
        return rfn.repack_fields(np.concatenate([np.zeros(0, TEXT)[[*names]], *batches])[self._order])

    def clip_quality(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield measurements of clips, arrays of the type CLIP; the row of each, and its number in that row. A batch
        has all clips of its rows, which are not in order."""
        row_of = np.empty_like(self._order)
        row_of[self._order] = np.arange(len(self._order))
        start = 0
        for batch in _read(self.folder, "quality"):
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

    def is_fresh(
        self, is_kept: Callable[[CheckedClip], bool], share: int, num_shares: int, stamps: Mapping[str, Stamp | None]
    ) -> bool:
        """Return whether, in a share of the rows, all files are unchanged and the data of all clips is still stored.

        Args:
            stamps: of files that have been examined already.
        """

        def own(kind: str) -> Iterator[pa.RecordBatch]:
            return islice(_read(self.folder, kind), share, None, num_shares)

        unchanged = map_in_threads(partial(_are_unchanged, stamps), own("files"), STAT_THREADS)
        return all(unchanged) and all(map_in_threads(partial(_are_kept, is_kept), own("clips"), STAT_THREADS))


def open_kept(folder: Path) -> Index | None:
    """Open an index that an earlier run has kept. Return None if its files are missing or damaged."""
    try:
        return Index(folder)
    except (OSError, pa.ArrowInvalid):
        return None


def _are_unchanged(stamps: Mapping[str, Stamp | None], files: pa.RecordBatch) -> bool:
    rows = zip(*(column.to_pylist() for column in files.columns), strict=True)
    return all((stamps.get(path) or stamp_of(path)) == (size, mtime) for path, size, mtime in rows)


def _are_kept(is_kept: Callable[[CheckedClip], bool], clips: pa.RecordBatch) -> bool:
    columns = zip(*(column.to_pylist() for column in clips.columns), strict=True)
    return all(is_kept(CheckedClip(key.hex(), num_frames, tuple(outputs))) for key, num_frames, outputs in columns)


def read_rows(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of an index in batches, in the order of its files, with the values of FACTS and CONTENT."""
    for facts, content in zip(_read(folder, "facts"), _read(folder, "content"), strict=True):
        yield [a | b for a, b in zip(facts.to_pylist(), content.to_pylist(), strict=True)]


def sample_of(row: dict[str, Any]) -> Sample:
    """Return the sample of a row. The path of each of its clips is just its source."""
    messages = _messages_of(json.loads(row["messages"]), AudioClip(Path(row["source"])))
    return Sample(messages, row["start_index"], row["speaker"], row["source"], row["language"])


def plain_of(row: dict[str, Any]) -> PlainForm | None:
    """Return the sample of a row without its reference, or None if it has none."""
    if row["plain"] is None:
        return None
    start_index, kept, values = json.loads(row["plain"])
    return PlainForm(_messages_of(values, AudioClip(Path(row["source"]))), start_index, tuple(kept))


def clips_of(row: dict[str, Any]) -> list[CheckedClip]:
    columns = zip(row["keys"], row["num_frames"], row["num_outputs"], strict=True)
    return [CheckedClip(key.hex(), num_frames, tuple(outputs)) for key, num_frames, outputs in columns]


def _files(folder: Path, kind: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{kind}-*.arrow"))]


def _read(folder: Path, kind: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all parts in batches, with one batch in memory at a time.

    Raises:
        InputError: there is no part; an index without rows has one.
    """
    files = _files(folder, kind)
    if not files:
        raise InputError(f"{folder}: has no {kind}; the cache was deleted while it was in use. Run it again")
    for path in files:
        with pa.OSFile(path) as file:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _mapped(folder: Path, kind: str, maps: list[mmap.mmap]) -> pa.Table:
    """Return the rows of all parts, concatenated. They are read from disk on access, from maps that are appended."""
    files = _files(folder, kind)
    if not files:
        raise FileNotFoundError(f"{folder}: has no {kind}; the cache was deleted while it was in use")
    tables = []
    for path in files:
        with open(path, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        tables.append(pa.ipc.open_file(pa.py_buffer(maps[-1])).read_all())
    return pa.concat_tables(tables)


def _values(column: pa.Array, dtype: np.dtype) -> np.ndarray:
    """Return the values of a whole column of bytes as a structured array."""
    return np.frombuffer(column.buffers()[-1] or b"", dtype)


def _numbers(column: pa.Array) -> np.ndarray:
    """Return a column without nulls. pyarrow's `to_numpy` would import pandas, and `flatten` its compute functions."""
    return np.from_dlpack(column)


def stamp_of(path: str) -> Stamp | None:
    """Return size and modification time of a file, or None if it does not exist."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _messages_of(values: list[Any], clip: AudioClip) -> tuple[Message, ...]:
    return tuple(
        Message(role, tuple(clip if part is None else part for part in parts), recipient)
        for role, recipient, parts in values
    )
