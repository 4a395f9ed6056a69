"""Columns of an index that only `--reference random` and `--reference_dropout` need. They are added when a run does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from higgs_ds.common.files import replaced_file
from higgs_ds.data.coder import Coder
from higgs_ds.data.index import clips_of, plain_of, read_rows, sample_of
from higgs_ds.data.index_writer import FILE_NAME, TableWriter
from higgs_ds.data.references import Candidate, candidate_of, pair_of
from higgs_ds.data.token_counter import TokenCounter

FILE = FILE_NAME.format("references", 0)
# One row for each of the index, in the order of its files. See `Candidate`.
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
NO_CANDIDATE = Candidate(0, 0, 0, 0, 0.0, 0.0, False)


def add_references(folder: Path, coder: Coder) -> None:
    """Add the columns to the index in a folder if it does not have them. Raises OSError."""
    path = folder / FILE
    if path.exists():
        return
    with replaced_file(path) as temporary:
        write_references(temporary, _rows(folder, coder))


def write_references(path: Path, rows: Iterable[tuple[int, Candidate | None]]) -> None:
    """Write a file of the columns, given each sample's `plain_tokens` and what it is as a reference for others."""
    table = TableWriter(path, REFERENCES)
    for plain_tokens, candidate in rows:
        c = candidate or NO_CANDIDATE
        table.add((plain_tokens, c.num_tokens, int(c.takes), c.words, c.clip, c.file, c.start_s, c.end_s))
    table.close()


def _rows(folder: Path, coder: Coder) -> Iterator[tuple[int, Candidate | None]]:
    counter = TokenCounter(coder)
    for rows in read_rows(folder):
        samples, plains = [sample_of(row) for row in rows], [plain_of(row) for row in rows]
        pairs = [pair_of(sample) if sample.clips else None for sample in samples]
        texts = counter.count_texts([*(plain.messages for plain in plains if plain), *filter(None, pairs)])
        for row, sample, plain, pair in zip(rows, samples, plains, pairs, strict=True):
            clips = clips_of(row)
            plain_tokens = counter.count(plain.messages, [clips[i] for i in plain.clips], texts) if plain else 0
            if pair is None:
                yield plain_tokens, None
                continue
            # Segments are tokenized separately: a pair adds the same to every sample. Alone, it begins the text.
            num_tokens = counter.count(pair, clips[-1:], texts) - 1
            place = (row["last_file"], row["last_start_s"], row["last_clip_s"])
            yield plain_tokens, candidate_of(sample, clips[-1].key, num_tokens, *place)
