"""The `csv` format: a table of recordings with a header, with `,`, tabs, `|` or `;` between the fields.

wav_filename,speaker,duration,transcript
clips/a.wav,anna,1.9,"Good morning, all."

With `,` and `;`, fields may be quoted. With tabs and `|`, a quotation mark is part of the text, as is usual in
transcripts in that form. Columns other than audio, text, speaker and language are ignored. Blank rows are skipped.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, path_of, printable, shown
from higgs_ds.data.formats.jsonio import Line, text_lines
from higgs_ds.data.formats.recordings import Columns, clip_of, columns_of, sample_of_row
from higgs_ds.model.sample import Entry, Sample
from higgs_ds.options.train import DataOptions

FILE_NAME = "metadata.csv"  # read where a folder is given
DELIMITERS = ",\t|;"
QUOTED = ",;"


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield the entries of a table; `source` holds the line on which a row begins."""
    path = path / FILE_NAME if path.is_dir() else path
    rows = _rows(path, delimiter_of(path))
    number, header, faults = next(rows, (1, [], []))
    if not header and not faults:
        return
    columns = columns_of(header)
    faults = faults or _header_faults(header, columns)
    if isinstance(columns, str) or faults:
        yield Entry(f"{printable(path)}:{number}", None, tuple(faults))
        return
    build = functools.partial(build_row, columns)
    shown_path = printable(path)
    for number, row, faults in rows:
        source = f"{shown_path}:{number}"
        if not faults and len(row) != len(header):
            faults = [f"row: has {len(row)} fields, but the header has {len(header)}; give one field per column"]
        if faults:
            yield Entry(source, None, tuple(faults))
        else:
            yield build_entry(dict(zip(header, row, strict=True)), Reading(path, source, options), build)


def _header_faults(header: list[str], columns: Columns | str) -> list[str]:
    missing = [f"header: {columns}"] if isinstance(columns, str) else []
    twice = sorted({name for name in header if name and header.count(name) > 1})
    return missing + [f"header: has column {shown(name)} more than once; keep one of them" for name in twice]


def build_row(columns: Columns, row: Any, reading: Reading) -> Sample | None:
    """Build one sample from its fields by column."""
    clip = clip_of(path_of(row[columns.audio], columns.audio, reading))
    return sample_of_row(row, columns, clip, reading)


def delimiter_of(path: Path) -> str:
    """Return the delimiter with which the first line has an audio and a text column; a comma if there is none."""
    first = next((line.text for line in text_lines(path) if line.text.strip()), "")
    return header_delimiter(first) or DELIMITERS[0]


def header_delimiter(line: str) -> str | None:
    """Return the delimiter with which a line is a header with an audio and a text column, or None."""
    for delimiter in DELIMITERS:
        try:
            names = next(row_reader(iter([line]), delimiter), [])
        except csv.Error:
            continue
        if isinstance(columns_of(names), Columns):
            return delimiter
    return None


def row_reader(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the fields of each row; raises csv.Error for a row that cannot be split."""
    if delimiter in QUOTED:
        return csv.reader(lines, delimiter=delimiter, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Yield each row that is not blank as (line on which it begins, fields, faults)."""
    row_lines: list[Line] = []  # the lines of the current row

    def feed() -> Iterator[str]:
        for line in text_lines(path):
            row_lines.append(line)
            yield line.text

    rows = row_reader(feed(), delimiter)
    while True:
        row_lines.clear()
        row: list[str] = []
        try:
            row = next(rows)
            faults = []
        except StopIteration:
            return
        except csv.Error as error:
            faults = [f"row: {error}"]
        faults += [f"row: {line.fault}" for line in row_lines if line.fault]
        if faults or any(field.strip() for field in row):
            yield row_lines[0].number, row, faults
