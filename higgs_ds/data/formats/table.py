"""The `table` format: Parquet files, or a dataset saved by Hugging Face `datasets` (`save_to_disk`).

    audio: {"bytes": ..., "path": "a.wav"}    text: "Good morning."    speaker_id: 7

A table is one Parquet file, a folder of Parquet files, or a saved dataset. The audio column holds the bytes of an audio
file, or its path relative to the folder of the table. If there is a `messages` column, each row is a ChatML
conversation. Only pyarrow reads the files: no code that comes with the data is run, and no audio is decoded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats import chatml
from higgs_ds.data.formats.checks import Reading, build_entry, kind_of, path_of, printable
from higgs_ds.data.formats.folders import list_files
from higgs_ds.data.formats.recordings import Columns, clip_of, columns_of, sample_of_row
from higgs_ds.data.formats.splits import split_of
from higgs_ds.model.sample import AudioClip, Entry, Sample
from higgs_ds.options.train import DataOptions

PARQUET, ARROW = ".parquet", ".arrow"
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by `save_to_disk` for one dataset, or for splits
BATCH_ROWS = 16  # rows of a Parquet file in memory at once: each may hold minutes of audio


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield the entries of a table; `source` counts the rows of each file from 1."""
    files, faults = table_files(path)
    yield from faults
    for file in files:
        yield from _read_file(file, options)


def table_files(path: Path) -> tuple[list[Path], list[Entry]]:
    """Return the files of a table in order, and the faults of its folder: of links, or if no file can be chosen."""
    if not path.is_dir():
        return [path], []
    faults: list[Entry] = []
    if (path / SAVED_SPLITS).is_file():
        found, faults = list_files(path, (Path(SAVED).suffix,))
        splits = [file.parent for file in found if file.name == SAVED and file.parent.parent == path]
        if len(splits) != 1:
            names = ", ".join(split.name for split in splits) or "none"
            fault = f"folder: must contain one split of a dataset, but contains {names}; give the folder of one split"
            return [], [*faults, _fault(path, fault)]
        path = splits[0]
    if (path / SAVED).is_file():
        files, fault = _saved_files(path)
        return files, [*faults, *([_fault(path, fault)] if fault else [])]
    files, faults = list_files(path, (PARQUET,))
    splits_found = sorted({split for file in files if (split := split_of(file.relative_to(path)))})
    if len(splits_found) > 1:
        names = ", ".join(splits_found)
        fault = f"folder: contains files of several splits ({names}); give a file or a folder of one split"
        return [], [*faults, _fault(path, fault)]
    return files, faults


def _fault(path: Path, fault: str) -> Entry:
    return Entry(printable(path), None, (printable(fault),))


def _saved_files(folder: Path) -> tuple[list[Path], str]:
    try:
        state = json.loads((folder / SAVED).read_bytes())
        names = [entry["filename"] for entry in state["_data_files"]]
        files = [folder / name for name in names if Path(name).name == name]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        return [], f"{SAVED}: does not list the dataset's files ({type(error).__name__}); save the dataset again"
    if len(files) != len(names):
        return [], f"{SAVED}: names files outside its folder; save the dataset again"
    return files, ""


def _read_file(path: Path, options: DataOptions) -> Iterator[Entry]:
    import pyarrow

    row = 0
    try:
        with pyarrow.memory_map(str(path)) as memory:
            schema, batches = _open(memory)
            columns, build = _choose_columns(schema)
            if isinstance(build, str):
                yield Entry(printable(path), None, (build,))
                return
            for batch in batches(columns):
                for i in range(batch.num_rows):
                    row += 1
                    yield _entry(batch, i, Reading(path, f"{printable(path)}:row {row}", options), build)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:200]
        yield Entry(printable(path), None, (f"table: cannot be read after row {row}: {printable(what)}",))


def _open(memory: Any) -> tuple[Any, Callable[[list[str]], Iterator[Any]]]:
    """Return the schema of a file, and a function that yields its record batches with the given columns."""
    import pyarrow.ipc
    import pyarrow.parquet

    if memory.size() >= 4 and memory.read_at(4, 0) == b"PAR1":
        # Pages are read as rows are requested. At worst a page is a whole row group, which is then in memory twice.
        file = pyarrow.parquet.ParquetFile(memory, pre_buffer=False)
        return file.schema_arrow, lambda columns: file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)
    stream = pyarrow.ipc.open_stream(memory)

    def batches(columns: list[str]) -> Iterator[Any]:
        for batch in stream:
            chosen = batch.select(columns)
            chosen.validate(full=True)  # else pyarrow trusts the offsets, and a damaged file could crash the process
            yield chosen

    return stream.schema, batches


def _choose_columns(schema: Any) -> tuple[list[str], Callable[[Any, Reading], Sample | None] | str]:
    """Return the columns to read, and the function that builds a sample from a row or, as a string, their fault."""
    names = [str(name) for name in schema.names]
    if len(set(names)) < len(names):
        return [], "columns: two columns have the same name; rename one of them"
    if "messages" in names:
        return [name for name in names if name in (*chatml.SAMPLE_KEYS, "audios")], chatml.build
    columns = columns_of(names)
    if isinstance(columns, str):
        return [], f"columns: {columns}"
    return [name for name in columns if name is not None], functools.partial(_build, columns)


def _entry(batch: Any, i: int, reading: Reading, build: Callable[[Any, Reading], Sample | None]) -> Entry:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except (UnicodeDecodeError, OverflowError, ValueError) as error:
            reading.report(name, f"cannot be read: {error}")
    return Entry(reading.source, None, tuple(reading.faults)) if reading.faults else build_entry(row, reading, build)


def _build(columns: Columns, row: Any, reading: Reading) -> Sample | None:
    return sample_of_row(row, columns, _clip(row[columns.audio], columns.audio, reading), reading)


def _clip(audio: Any, where: str, reading: Reading) -> AudioClip | None:
    if isinstance(audio, bytes) and audio:
        return AudioClip(reading.manifest, data=audio)
    if isinstance(audio, str):
        return clip_of(path_of(audio, where, reading))
    if isinstance(audio, dict) and {"bytes", "path"} & audio.keys():
        if isinstance(audio.get("bytes"), bytes) and audio["bytes"]:
            return AudioClip(reading.manifest, data=audio["bytes"])
        return clip_of(path_of(audio.get("path"), f"{where}.path", reading))
    what = f"an object with {', '.join(map(repr, audio))}" if isinstance(audio, dict) else kind_of(audio)
    reading.report(where, f"must be a path, an audio file's bytes, or an object with 'bytes' and 'path', but is {what}")
    return None
