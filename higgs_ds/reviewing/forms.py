"""Which lists can be reviewed: those that hold the texts of their clips, and can be written back without loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import csv_file, lists
from higgs_ds.data.formats.jsonio import first_character, is_utf8
from higgs_ds.data.formats.reader import AUTO, FOLDER_FILES
from higgs_ds.data.formats.recognition import recognize
from higgs_ds.data.formats.recordings import columns_of
from higgs_ds.options.fields import PAIRS
from higgs_ds.reviewing.json_list import JsonArray, JsonLines
from higgs_ds.reviewing.pair_list import PAIRS_FILE, PairLines, is_pair_list
from higgs_ds.reviewing.pieces import Form
from higgs_ds.reviewing.row_list import FileList, Rows, Table

WHAT_TO_DO = (
    "write a metadata.jsonl beside the clips, one line for each: "
    '{"file_name": "a.wav", "text": "Good morning.", "speaker": "anna"}'
)


def form_of(path: Path, format_name: str = AUTO) -> Form:
    """Return the form of a list.

    Raises:
        InputError: its format is not detected, or its texts are not in the list, so that it cannot be written back.
        OSError: it cannot be read.
    """
    if format_name == PAIRS or (format_name == AUTO and is_pair_list(path)):
        return PairLines()
    name = recognize(path) if format_name == AUTO else format_name
    if name == "flat":
        return JsonArray() if first_character(path) == "[" else JsonLines()
    if name == "list":
        rows = itertools.islice(_texts(path), lists.HEAD)
        layout = lists.layout_of([[field.strip() for field in line.split("|")] for line in rows])
        if isinstance(layout, str):
            raise InputError(f"fields: {layout}")
        return FileList(layout)
    if name == "csv":
        return _table_of(path)
    raise InputError(
        f"format: {name} is not a list of clips with their texts, which could be changed line by line (flat, csv or "
        f"list); {WHAT_TO_DO}"
    )


def file_of(path: Path, format_name: str = AUTO) -> Path:
    """Return the list that a folder contains; a file is returned unchanged. Raises as `form_of`."""
    if not path.is_dir():
        return path
    if format_name in (AUTO, PAIRS) and (path / PAIRS_FILE).is_file():
        return path / PAIRS_FILE
    name = recognize(path) if format_name == AUTO else format_name
    file = path / FOLDER_FILES.get(name, "")
    if name not in ("flat", "csv", "list") or not file.is_file():
        raise InputError(f"format: {name}: the folder has no list of clips with their texts; {WHAT_TO_DO}")
    return file


def _table_of(path: Path) -> Table:
    delimiter = csv_file.delimiter_of(path)
    head = "".join(itertools.islice(_texts(path), lists.HEAD))
    header = next((row or [] for _, row in Rows(head, delimiter) if row is None or any(map(str.strip, row))), [])
    columns = columns_of(header)
    if not is_utf8("".join(header)):
        raise InputError("header: not UTF-8; save the file as UTF-8")
    if isinstance(columns, str):
        raise InputError(f"header: {columns}")
    if len({name for name in header if name}) < len([name for name in header if name]):
        raise InputError("header: has a column more than once; keep one of them")
    return Table(delimiter, tuple(header), columns)


def _texts(path: Path) -> Iterator[str]:
    """Yield the lines of a file that are not blank."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        yield from (line for line in file if line.strip())
