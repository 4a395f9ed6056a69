"""CheckedManifest samples on disk, memory-mapped: a million of them take no more memory than the pages that are read.

A folder of Arrow files, two for each rank that checked a share of the samples, and `index.json`. Rows are in the
manifest's order, whatever the number of ranks was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from higgs_ds.data.code_cache import KEY_BYTES
from higgs_ds.data.sample import AudioClip, Message, Sample

VERSION = 2  # raise it with every change to what is written
ROWS_PER_BATCH = 1024
DIGEST_BYTES = 16
DESCRIPTION = "index.json"
# What is looked at of all samples at once: little, and in files of its own, since reading maps the pages around it.
FACTS = pa.schema(
    [
        ("number", pa.int64()),  # of the sample in its manifest, from 0
        ("num_tokens", pa.int32()),
        ("num_frames", pa.list_(pa.int32())),  # of each clip
        ("num_outputs", pa.list_(pa.list_(pa.int32()))),  # of a Whisper tower, for the stretches of each clip it hears
        ("speaker", pa.string()),
        ("language", pa.string()),
        ("digest", pa.binary(DIGEST_BYTES)),  # the same for two samples that are the same to the model
    ]
)
# What is read of a sample when its turn comes, and when an index is held against the files.
CONTENT = pa.schema(
    [
        ("source", pa.string()),
        ("messages", pa.string()),  # JSON, null for a clip
        ("start_index", pa.int32()),
        ("keys", pa.list_(pa.binary(KEY_BYTES))),  # of the clips' codes
        ("paths", pa.list_(pa.string())),  # of the files that the sample was read from, with size and time of change
        ("sizes", pa.list_(pa.int64())),
        ("mtimes", pa.list_(pa.int64())),
    ]
)
SCHEMAS = {"facts": FACTS, "content": CONTENT}


@dataclass(frozen=True)
class CheckedClip:
    """The name of a clip's codes, how many frames they have; what a Whisper tower has for each stretch it hears."""

    key: str
    num_frames: int
    num_outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckedSample:
    """A sample, and what was found out about its clips."""

    number: int
    sample: Sample
    num_tokens: int
    clips: tuple[CheckedClip, ...]
    files: tuple[tuple[str, int, int], ...]  # path, size in bytes, time of change in ns

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Values in the order of each of the SCHEMAS."""
        sample = self.sample
        messages = _messages_to_json(sample.messages)
        keys = tuple(clip.key for clip in self.clips)
        num_frames, num_outputs = [clip.num_frames for clip in self.clips], [clip.num_outputs for clip in self.clips]
        identity = repr((messages, sample.start_index, keys)).encode()
        digest = hashlib.blake2b(identity, digest_size=DIGEST_BYTES).digest()
        paths, sizes, mtimes = zip(*self.files, strict=True) if self.files else ((), (), ())
        names = [bytes.fromhex(key) for key in keys]
        speaker, language = sample.speaker, sample.language
        return {
            "facts": (self.number, self.num_tokens, num_frames, num_outputs, speaker, language, digest),
            "content": (sample.source, messages, sample.start_index, names, paths, sizes, mtimes),
        }


class PartWriter:
    """Writes one rank's share of an index, a batch of rows at a time."""

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
            arrays = [pa.array(values, of_type) for of_type, values in zip(schema.types, columns, strict=True)]
            self._writers[kind].write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        self._rows = []


class Index:
    """Random access to the rows of all parts, in the order of the manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._facts, self._content = (_mapped(folder, kind) for kind in SCHEMAS)
        self._order = np.argsort(self._facts["number"].to_numpy(), kind="stable")
        self.num_tokens = self._facts["num_tokens"].to_numpy()[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def sample(self, row: int) -> tuple[Sample, list[CheckedClip]]:
        """A sample, whose clips are named by its source alone, and what is known of these."""
        at = int(self._order[row])
        content, facts = (table.slice(at, 1).to_pylist()[0] for table in (self._content, self._facts))
        messages = _messages_from_json(content["messages"], AudioClip(Path(content["source"])))
        sample = Sample(messages, content["start_index"], facts["speaker"], content["source"], facts["language"])
        return sample, _clips_of(content | facts)

    def sources(self, rows: Iterable[int]) -> list[str]:
        return [self._content["source"][int(self._order[row])].as_py() for row in rows]

    def labels(self, name: str) -> tuple[np.ndarray, list[str]]:
        """A column of words (speaker, language): for each row the number of its word, -1 for none, and the words."""
        column = self._facts[name].take(pa.array(self._order)).combine_chunks().dictionary_encode()
        return column.indices.fill_null(-1).to_numpy(zero_copy_only=False), column.dictionary.to_pylist()

    def any_heard(self) -> bool:
        """Whether a Whisper tower hears any of the clips."""
        return len(pc.list_flatten(pc.list_flatten(self._facts["num_outputs"]))) > 0

    def digests(self) -> np.ndarray:
        """16 bytes for each row that tell whether two samples are the same to the model."""
        chunks = [
            np.frombuffer(chunk.buffers()[1], f"V{DIGEST_BYTES}", len(chunk), chunk.offset * DIGEST_BYTES)
            for chunk in self._facts["digest"].chunks
        ]
        return np.concatenate(chunks)[self._order]

    def clip_frames(self) -> np.ndarray:
        """Frames of all clips of all rows."""
        return self._facts["num_frames"].combine_chunks().flatten().to_numpy()

    def is_fresh(self, is_kept: Callable[[CheckedClip], bool], share: int, num_shares: int) -> bool:
        """Whether every file of a share of the rows is as it was, and all that its clips were made into is kept."""
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
    """An index that an earlier run has kept, or None where its files have gone or are damaged."""
    try:
        return Index(folder)
    except (OSError, pa.ArrowInvalid):
        return None


def _row_is_fresh(row: dict[str, Any], is_kept: Callable[[CheckedClip], bool]) -> bool:
    stamps = zip(row["paths"], row["sizes"], row["mtimes"], strict=True)
    return all(stamp_of(path) == (size, mtime) for path, size, mtime in stamps) and all(map(is_kept, _clips_of(row)))


def _clips_of(row: dict[str, Any]) -> list[CheckedClip]:
    of_clips = zip(row["keys"], row["num_frames"], row["num_outputs"], strict=True)
    return [CheckedClip(key.hex(), num_frames, tuple(outputs)) for key, num_frames, outputs in of_clips]


def _files(folder: Path, kind: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{kind}-*.arrow"))]


def _read(folder: Path, kind: str) -> Iterator[pa.RecordBatch]:
    """The rows of all parts in batches, one in memory at a time."""
    for path in _files(folder, kind):
        with pa.OSFile(path) as file:
            reader = pa.ipc.open_file(file)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))


def _mapped(folder: Path, kind: str) -> pa.Table:
    """The rows of all parts, one part behind the other; not read before they are asked for."""
    return pa.concat_tables([pa.ipc.open_file(pa.memory_map(path)).read_all() for path in _files(folder, kind)])


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
