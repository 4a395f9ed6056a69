"""A table of recordings with a header, as CSV, TSV or with `|` or `;` between the fields.

wav_filename,speaker,duration,transcript
clips/a.wav,anna,1.9,"Good morning, all."

Fields may be quoted in CSV (`,` and `;`); between tabs and `|` a quotation mark is part of the text, as it is in the
transcripts that come so. Columns beyond audio, text, speaker and language are not read.
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
from higgs_ds.data.sample import Entry, Sample
from higgs_ds.options.train import DataOptions

FILE_NAME = "metadata.csv"  # in a folder
DELIMITERS = ",\t|;"
QUOTED = ",;"


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """The entries of a table; `source` has the line on which a row begins."""
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
    build = functools.partial(_build, columns)
    shown_path = printable(path)
    for number, row, faults in rows:
        source = f"{shown_path}:{number}"
        if not faults and len(row) != len(header):
            faults = [f"row: has {len(row)} fields, the header has {len(header)}"]
        if faults:
            yield Entry(source, None, tuple(faults))
        else:
            yield build_entry(dict(zip(header, row, strict=True)), Reading(path, source, options), build)


def _header_faults(header: list[str], columns: Columns | str) -> list[str]:
    missing = [f"header: {columns}"] if isinstance(columns, str) else []
    twice = sorted({name for name in header if name and header.count(name) > 1})
    return missing + [f"header: has {shown(name)} more than once" for name in twice]


def _build(columns: Columns, row: Any, reading: Reading) -> Sample | None:
    clip = clip_of(path_of(row[columns.audio], columns.audio, reading))
    return sample_of_row(row, columns, clip, reading)


def delimiter_of(path: Path) -> str:
    """What stands between the fields of the first line: the one that gives an audio and a text column, or a comma."""
    first = next((line.text for line in text_lines(path) if line.text.strip()), "")
    return header_delimiter(first) or DELIMITERS[0]


def header_delimiter(line: str) -> str | None:
    """The delimiter that makes a line a header with an audio and a text column, if there is one."""
    for delimiter in DELIMITERS:
        try:
            names = next(_reader(iter([line]), delimiter), [])
        except csv.Error:
            continue
        if isinstance(columns_of(names), Columns):
            return delimiter
    return None


def _reader(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    if delimiter in QUOTED:
        return csv.reader(lines, delimiter=delimiter, strict=True)
    return csv.reader(lines, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Each row that is not blank, as (the line on which it begins, fields, what is wrong with it)."""
    taken: list[Line] = []  # the lines of the row at hand

    def feed() -> Iterator[str]:
        for line in text_lines(path):
            taken.append(line)
            yield line.text

    rows = _reader(feed(), delimiter)
    while True:
        taken.clear()
        row: list[str] = []
        try:
            row = next(rows)
            faults = []
        except StopIteration:
            return
        except csv.Error as error:
            faults = [f"row: {error}"]
        faults += [f"row: {line.fault}" for line in taken if line.fault]
        if faults or any(field.strip() for field in row):
            yield taken[0].number, row, faults
