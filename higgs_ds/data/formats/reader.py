"""The entry point of the readers: training data in any format, detected from its content, one entry per sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import (
    audiofolder,
    chatml,
    csv_file,
    flat,
    kaldi,
    lab,
    librispeech,
    libritts,
    lists,
    metadata,
    native,
    paired,
    pairs,
    swift,
    table,
    vctk,
    webdataset,
)
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.recognition import NO_SAMPLES, recognize
from higgs_ds.data.speaker_prompts import SpeakerPrompts
from higgs_ds.model.sample import Entry, PendingEntry
from higgs_ds.options.fields import FORMATS
from higgs_ds.options.train import DataOptions

AUTO = "auto"
READERS: dict[str, Callable[[Path, DataOptions], Iterable[Entry | PendingEntry]]] = {
    "chatml": chatml.read,
    "native": native.read,
    "swift": swift.read,
    "metadata": metadata.read,
    "paired": paired.read,
    "list": lists.read,
    "csv": csv_file.read,
    "flat": flat.read,
    "table": table.read,
    "audiofolder": audiofolder.read,
    "libritts": libritts.read,
    "librispeech": librispeech.read,
    "vctk": vctk.read,
    "kaldi": kaldi.read,
    "lab": lab.read,
    "webdataset": webdataset.read,
    "pairs": pairs.read,
}
# The file that a folder must contain to be read in a format. The formats in none of these are single files.
FOLDER_FILES = {
    "metadata": metadata.FILE_NAME, "list": csv_file.FILE_NAME, "csv": csv_file.FILE_NAME, "flat": flat.FILE_NAME,
    "kaldi": kaldi.FILE_NAME,
}  # fmt: skip
FOLDERS_ONLY = ("paired", "audiofolder", "libritts", "librispeech", "vctk", "kaldi", "lab")
ANY_FOLDER = ("paired", "audiofolder", "libritts", "librispeech", "vctk", "lab", "table", "webdataset")


def read_entries(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield an entry for each sample of a file or folder, in the order of the input: the sample or its faults.

    A fault of the input as a whole is an entry too, with the path as its source. Only structure and text are checked;
    audio files are not opened. Memory is bounded by the longest sample (in Parquet: by the largest row group), not by
    the number of samples.
    """
    return (entry() for entry in pending_entries(path, options))


def pending_entries(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of `read_entries`. Those that are not called for are not built, if the format allows it."""
    is_empty = True
    try:
        prompts = SpeakerPrompts(options)
        for entry in READERS[_format_of(path, options)](path, options):
            is_empty = False
            yield functools.partial(_built, path, entry, prompts)
        fault = NO_SAMPLES if is_empty else ""
    except (InputError, OSError) as error:
        fault = _fault(path, error)
    if fault:
        yield functools.partial(_whole, path, fault)


def _built(path: Path, entry: Entry | PendingEntry, prompts: SpeakerPrompts) -> Entry:
    try:
        return prompts.apply(entry if isinstance(entry, Entry) else entry())
    except (InputError, OSError) as error:
        return _whole(path, _fault(path, error))


def _whole(path: Path, fault: str) -> Entry:
    return Entry(printable(path), None, (printable(fault),))


def _fault(path: Path, error: InputError | OSError) -> str:
    if isinstance(error, InputError):
        return str(error)
    which = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
    return f"cannot be read: {error.strerror or error}{which}"


def _format_of(path: Path, options: DataOptions) -> str:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError("is neither a file nor a folder")  # a pipe can be read only once, and might never end
    name = recognize(path) if options.format == AUTO else options.format
    if name not in READERS:
        raise InputError(f"format: {name!r} is not a known format; allowed: {', '.join((AUTO, *FORMATS))}")
    if path.is_dir():
        if name not in ANY_FOLDER and not (name in FOLDER_FILES and (path / FOLDER_FILES[name]).is_file()):
            needed = f"a folder with {FOLDER_FILES[name]}" if name in FOLDER_FILES else "a file"
            raise InputError(f"format: {name} needs {needed}, which this folder is not; change --format or the path")
    elif name in FOLDERS_ONLY:
        path.stat()  # raises an OSError if nothing is there
        raise InputError(f"format: {name} needs a folder, but this is a file; change --format or the path")
    return name
