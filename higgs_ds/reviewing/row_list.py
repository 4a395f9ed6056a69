"""Lists with fields in pieces: tables with a header, and lines with `|` between the fields."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import csv_file, lists
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.recordings import Columns
from higgs_ds.model.sample import Entry
from higgs_ds.reviewing.pieces import LINE, MARK, Form, Pieces, entry_of, lines_as_pieces


@dataclass(frozen=True)
class Table(Form):
    """A table with a header, as `csv` reads it."""

    delimiter: str
    header: tuple[str, ...]
    columns: Columns

    def split(self, text: str) -> Pieces:
        rows = Rows(text, self.delimiter)
        head, has_header, clips = rows.mark, False, list[str]()
        for raw, row in rows:
            is_blank = row is not None and not any(field.strip() for field in row)
            if has_header and not is_blank:
                clips.append(raw)
            elif clips:
                clips[-1] += raw
            else:
                head += raw
                has_header = has_header or not is_blank
        return Pieces(head, clips)

    def record(self, piece: str) -> str:
        return next(iter(Rows(piece, self.delimiter)))[0].rstrip("\r\n")

    def entry(self, piece: str, path: Path) -> Entry:
        row = self._row(piece)
        if row is None:
            return Entry(printable(path), None, ("row: cannot be split into fields",))
        if len(row) != len(self.header):
            fault = f"row: has {len(row)} fields, but the header has {len(self.header)}"
            return Entry(printable(path), None, (fault,))
        build = functools.partial(csv_file.build_row, self.columns)
        return entry_of(dict(zip(self.header, row, strict=True)), path, build)

    def text(self, piece: str) -> str | None:
        row = self._row(piece)
        return row[self._text_field] if row is not None and len(row) == len(self.header) else None

    def with_text(self, piece: str, text: str) -> str:
        row, record = self._row(piece), self.record(piece)
        assert row is not None
        spans = list(self._fields(record))
        expected = [*row]
        expected[self._text_field] = text
        start, end = spans[self._text_field] if len(spans) == len(row) else (0, len(record))
        new = f"{record[:start]}{self._quoted(text, record[start:end])}{record[end:]}"
        if self._row(new) != expected:
            needs = "" if self.delimiter in csv_file.QUOTED else f", which must not contain {self.delimiter!r}"
            raise InputError(f"text: cannot be written into one field of this table{needs}; change it")
        return new + piece[len(record) :]

    @property
    def _text_field(self) -> int:
        return self.header.index(self.columns.text)

    def _row(self, piece: str) -> list[str] | None:
        return next((row for _, row in Rows(piece, self.delimiter)), None)

    def _fields(self, record: str) -> Iterator[tuple[int, int]]:
        delimiter = re.escape(self.delimiter)
        quoted = '"(?:[^"]|"")*"|' if self.delimiter in csv_file.QUOTED else ""
        field = re.compile(f"(?:{quoted}[^{delimiter}]*)(?={delimiter}|$)", re.DOTALL)
        start = 0
        while match := field.match(record, start):
            yield match.span()
            start = match.end() + 1
            if start > len(record):
                return

    def _quoted(self, text: str, before: str) -> str:
        if self.delimiter not in csv_file.QUOTED:
            return text
        if before.startswith('"') or any(c in text for c in (self.delimiter, '"', "\r", "\n")):
            return '"' + text.replace('"', '""') + '"'
        return text


@dataclass(frozen=True)
class FileList(Form):
    """Lines with `|` between the fields, as `list` reads them."""

    layout: tuple[str, ...]

    def split(self, text: str) -> Pieces:
        return lines_as_pieces(text)

    def record(self, piece: str) -> str:
        return piece.partition("\n")[0]

    def entry(self, piece: str, path: Path) -> Entry:
        fields = self._fields(piece)
        if len(fields) != len(self.layout):
            return Entry(printable(path), None, (f"line: has {len(fields)} fields instead of {'|'.join(self.layout)}",))
        row = dict(zip(self.layout, (field.strip() for field in fields), strict=True))
        return entry_of(row, path, lists.build)

    def text(self, piece: str) -> str | None:
        fields = self._fields(piece)
        return fields[self._text_field].strip() if len(fields) == len(self.layout) else None

    def with_text(self, piece: str, text: str) -> str:
        if "|" in text or "\n" in text:
            raise InputError("text: must not contain '|' or a line break in a list with '|' between the fields")
        record = self.record(piece)
        fields = self._fields(piece)
        old = fields[self._text_field]
        blank_before = old[: len(old) - len(old.lstrip())]
        blank_after = old[len(blank_before) :][len(old.strip()) :]
        fields[self._text_field] = blank_before + text + blank_after
        return "|".join(fields) + piece[len(record) :]

    @property
    def _text_field(self) -> int:
        return self.layout.index(lists.TEXT)

    def _fields(self, piece: str) -> list[str]:
        return self.record(piece).split("|")


class Rows:
    """The rows of a table with their text: (text, fields), where fields that cannot be split are None."""

    def __init__(self, text: str, delimiter: str) -> None:
        self.mark = MARK if text.startswith(MARK) else ""
        self._lines = LINE.findall(text[len(self.mark) :])
        self._delimiter = delimiter

    def __iter__(self) -> Iterator[tuple[str, list[str] | None]]:
        read: list[str] = []

        def feed() -> Iterator[str]:
            for line in self._lines:
                read.append(line)
                yield line

        rows = csv_file.row_reader(feed(), self._delimiter)
        while True:
            read.clear()
            row: list[str] | None = None
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                pass
            yield "".join(read), row
