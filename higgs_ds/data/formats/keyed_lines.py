"""Text files of lines `KEY VALUE`, in any order, found by key in bounded memory."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from higgs_ds.data.formats.checks import shown

LONGEST_LINE = 1 << 20  # bytes
SHOWN_BYTES = 80


class KeyedLine(NamedTuple):
    """A line, counted from 1, and its fault if any. Keys end at the first space or tab, as in Kaldi."""

    number: int
    key: str
    value: str
    fault: str = ""


class KeyedLines:
    """The lines of a file that are not blank. In memory are 33 bytes of each: hash of its key, place, numbers, use.

    Use it as a context manager, and from one thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        hashes, places, numbers = array("q"), array("q"), array("q")
        number = place = 0
        while raw := self._file.readline(LONGEST_LINE):
            number += 1
            start = place
            place += len(raw)
            if number == 1 and raw.startswith(codecs.BOM_UTF8):
                start, raw = len(codecs.BOM_UTF8), raw.removeprefix(codecs.BOM_UTF8)
            while len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):  # the rest of a line that is too long
                rest = self._file.readline(LONGEST_LINE)
                place += len(rest)
                if len(rest) < LONGEST_LINE or rest.endswith(b"\n"):
                    break
            if fields := raw.split(None, 1):
                hashes.append(hash(fields[0]))
                places.append(start)
                numbers.append(number)
        self._places, self._numbers = places, numbers
        all_hashes = np.frombuffer(hashes, np.int64) if hashes else np.empty(0, np.int64)
        self._order = np.argsort(all_hashes, kind="stable").astype(np.int64)
        self._hashes = all_hashes[self._order]
        self._may_repeat = bool((self._hashes[1:] == self._hashes[:-1]).any())
        self._is_used = np.zeros(len(numbers), bool)

    def __enter__(self) -> KeyedLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[KeyedLine]:
        """Yield all lines, in the order of the file."""
        return map(self._line, range(len(self._numbers)))

    def take(self, key: str) -> KeyedLine | None:
        """Return the first line with a key, and mark it as used; None if there is no such line."""
        found = self._find(key)
        if found is None:
            return None
        index, line = found
        self._is_used[index] = True
        return line

    def is_repeated(self, line: KeyedLine) -> int:
        """Return the number of the first line with the key of a line if that is an earlier one, else 0."""
        found = self._find(line.key) if self._may_repeat else None
        return found[1].number if found and found[1].number < line.number else 0

    def unused(self) -> Iterator[KeyedLine]:
        """Yield the lines that have not been taken."""
        return (self._line(int(index)) for index in np.flatnonzero(~self._is_used))

    def _find(self, key: str) -> tuple[int, KeyedLine] | None:
        wanted = hash(key.encode("utf-8", "surrogateescape"))
        at = int(self._hashes.searchsorted(wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            index = int(self._order[at])
            line = self._line(index)
            if line.key == key:
                return index, line
            at += 1
        return None

    def _line(self, index: int) -> KeyedLine:
        self._file.seek(self._places[index])
        raw = self._file.readline(LONGEST_LINE)
        number, fault = self._numbers[index], ""
        if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
            fault, raw = f"the line is longer than {LONGEST_LINE} bytes", raw[:SHOWN_BYTES]
        key, value = [*raw.split(None, 1), b""][:2]
        try:
            return KeyedLine(number, key.decode("utf-8"), value.decode("utf-8").strip(), fault)
        except UnicodeDecodeError:
            fault = fault or f"{shown(raw[:SHOWN_BYTES])} is not UTF-8; save the file as UTF-8"
        return KeyedLine(
            number, key.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape").strip(), fault
        )
