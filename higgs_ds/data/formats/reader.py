"""The entry point of the readers: training data in any format, detected from its content, one entry per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    swift,
    table,
    vctk,
    webdataset,
)
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.recognition import NO_SAMPLES, recognize
from higgs_ds.data.sample import Entry
from higgs_ds.options.fields import FORMATS
from higgs_ds.options.train import DataOptions

AUTO = "auto"
READERS: dict[str, Callable[[Path, DataOptions], Iterator[Entry]]] = {
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
    is_empty = True
    try:
        for entry in READERS[_format_of(path, options)](path, options):
            is_empty = False
            yield entry
        fault = NO_SAMPLES if is_empty else ""
    except InputError as error:
        fault = str(error)
    except OSError as error:
        which = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        fault = f"cannot be read: {error.strerror or error}{which}"
    if fault:
        yield Entry(printable(path), None, (printable(fault),))


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
