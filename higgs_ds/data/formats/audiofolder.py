"""The `audiofolder` format: Hugging Face's AudioFolder, with a metadata file in each of one or more sub-folders.

train/metadata.csv    file_name,transcription      or train/metadata.jsonl, or train/metadata.parquet
train/a.wav           a.wav,Good morning.

Paths are relative to the folder of their metadata file. Columns and keys have the names of the `csv` and `flat`
formats. A metadata file in the given folder itself is read by these formats, or by `table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from higgs_ds.data.formats import csv_file, flat, table
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.folders import walk
from higgs_ds.data.formats.splits import split_fault
from higgs_ds.model.sample import Entry, PendingEntry
from higgs_ds.options.train import DataOptions

PARQUET_NAME = "metadata.parquet"
READERS: dict[str, Callable[[Path, DataOptions], Iterable[Entry | PendingEntry]]] = {
    csv_file.FILE_NAME: csv_file.read, flat.FILE_NAME: flat.read, PARQUET_NAME: table.read,
}  # fmt: skip


def read(path: Path, options: DataOptions) -> Iterator[Entry | PendingEntry]:
    """Yield the entries of all metadata files of a folder, of one split."""
    files: list[Path] = []
    for listing in walk(path, tuple(Path(name).suffix for name in READERS)):
        found = [file for file in listing.files if file.name in READERS]
        files += found
        yield from listing.faults
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            fault = f"folder: contains {names}; keep one of them"
            yield Entry(printable(listing.folder), None, (fault,))
            return
    fault = split_fault(path, [file.parent for file in files])
    if fault:
        yield Entry(printable(path), None, (printable(fault),))
        return
    for file in files:
        yield from READERS[file.name](file, options)
