"""Lines, JSON Lines and JSON arrays read value by value, with line numbers, in bounded memory.

[                                    <- JSON array: each value has the line on which it begins
 {"messages": [...]},
 {"messages": [...]}
]
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

CHUNK = 1 << 20
LONGEST = 1 << 28  # of one line or value: ten minutes of stereo audio in base64 fit
LONGEST_INT = 300  # digits; a longer number fits no float, and costs quadratic time to read
LONGEST_LITERAL = len("-Infinity") + 1  # so close to the end of a window, what is found may be due to the cut
_BLANK = re.compile(r"[ \t\n\r]*")


class Line(NamedTuple):
    """A line of text with its end, bytes that are not UTF-8 as lone surrogates, and what is wrong with it."""

    number: int
    text: str
    fault: str | None = None


class Item(NamedTuple):
    """A value and the line on which it begins, or what is wrong there."""

    line: int
    value: Any
    fault: str | None = None


class InvalidJsonError(Exception):
    """From here on the text is not JSON."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"not JSON: {what}")
        self.line = line


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_lines(path: Path) -> Iterator[Line]:
    """The lines of a file, ended by a line feed only (JSON strings and transcripts may hold other line separators)."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST):
            number += 1
            if len(raw) == LONGEST and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(CHUNK)
                yield Line(number, "", f"a line of more than {LONGEST >> 20} MiB")
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield Line(number, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"
                yield Line(number, raw.decode("utf-8", "surrogateescape"), fault)


def json_items(path: Path) -> Iterator[Item]:
    """The values of a JSON array where the text begins with a bracket, else of JSON Lines."""
    return array_items(path) if first_character(path) == "[" else line_items(path)


def first_character(path: Path) -> str:
    """The first character that is not blank; empty where there is none."""
    with path.open("rb") as file:
        return _Window(file).peek()


def line_items(path: Path) -> Iterator[Item]:
    """The values of JSON Lines; blank lines are passed over."""
    for line in text_lines(path):
        if line.fault:
            yield Item(line.number, None, f"not JSON: {line.fault}")
        elif line.text.strip():
            try:
                yield Item(line.number, _DECODER.decode(line.text))
            except json.JSONDecodeError as error:
                yield Item(line.number, None, f"not JSON: {error.msg} at character {error.colno} of the line")
            except RecursionError:
                yield Item(line.number, None, "not JSON: lists or objects nested too deeply")


def array_items(path: Path, member: str = "") -> Iterator[Item]:
    """The values of the list that a file holds, or, where it holds an object, of the list under `member`."""
    with path.open("rb") as file:
        window = _Window(file)
        try:
            if window.peek() == "{":
                yield from _member_items(window, member)
            else:
                yield from _list_items(window)
            if window.peek():
                raise window.torn("more text behind its end")
        except InvalidJsonError as torn:
            yield Item(torn.line, None, f"{torn}; the rest of the file was not read")


def object_shape(path: Path, member: str) -> tuple[bool, bool]:
    """Whether the object that a file begins with has a list under `member`, and whether it goes over several lines.

    Raises:
        InvalidJsonError: it is no object, or breaks off.
    """
    with path.open("rb") as file:
        window = _Window(file)
        window.peek()
        first_line = window.line
        for name in _member_names(window):
            if name == member and window.peek() == "[":
                return True, window.line > first_line
            window.value()
        return False, window.line > first_line


def _list_items(window: _Window) -> Iterator[Item]:
    window.take("[")
    if window.peek() == "]":
        window.take("]")
        return
    while True:
        window.peek()
        line = window.line
        value, is_intact = window.value()
        yield Item(line, value, None if is_intact else "not JSON: not UTF-8; save the file as UTF-8")
        if window.take(",]") == "]":
            return


def _member_items(window: _Window, member: str) -> Iterator[Item]:
    for name in _member_names(window):
        if name == member and window.peek() == "[":
            yield from _list_items(window)
        else:
            window.value()


def _member_names(window: _Window) -> Iterator[str]:
    """The names in an object. Whoever takes one must move the window behind its value before the next."""
    window.take("{")
    if window.peek() == "}":
        window.take("}")
        return
    while True:
        if window.peek() != '"':
            raise window.torn("expected a name in double quotes")
        name, _ = window.value()
        window.take(":")
        yield name
        if window.take(",}") == "}":
            return


class _Window:
    """A stretch of a text file that moves on as its values are taken."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._position, self._at_end = "", 0, False
        self.line = 1

    def torn(self, what: str) -> InvalidJsonError:
        return InvalidJsonError(self.line, what)

    def peek(self) -> str:
        """Move to the next character that is not blank; returns it, or an empty text at the end."""
        while True:
            match = _BLANK.match(self._text, self._position)
            self._move(match.end() if match else self._position)
            if self._position < len(self._text) or not self._more():
                return self._text[self._position : self._position + 1]

    def take(self, allowed: str) -> str:
        """Move behind the next character, which must be one of `allowed`."""
        found = self.peek()
        if not found or found not in allowed:
            raise self.torn(f"expected {' or '.join(map(repr, allowed))}, found {ascii(found) if found else 'the end'}")
        self._move(self._position + 1)
        return found

    def value(self) -> tuple[Any, bool]:
        """Move behind the next value; returns it, and whether its text is UTF-8."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_LITERAL
                if is_cut and self._more():
                    continue
                line = self.line + self._text.count("\n", self._position, error.pos)
                raise InvalidJsonError(self.line, f"{error.msg} in line {line}") from None
            except RecursionError:
                raise self.torn("lists or objects nested too deeply") from None
            if end > len(self._text) - LONGEST_LITERAL and self._more():
                continue  # a number may go on: -1.5 may be the front of -1.5e-07
            is_intact = is_utf8(self._text[self._position : end])
            self._move(end)
            return value, is_intact

    def _move(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _more(self) -> bool:
        """Read on, as much again as is held, so that a long value is not decoded over and over."""
        held = self._text[self._position :]
        if len(held) > LONGEST:
            raise self.torn(f"a value of more than {LONGEST >> 20} MiB")
        grown = ""
        while not grown and not self._at_end:
            raw = self._file.read(max(CHUNK, len(held)))
            self._at_end = not raw
            grown = self._decode(raw, self._at_end)
        if grown:
            self._text, self._position = held + grown, 0
        return bool(grown)


def _int(digits: str) -> float:
    if len(digits) <= LONGEST_INT:
        return int(digits)
    return -math.inf if digits.startswith("-") else math.inf


_DECODER = json.JSONDecoder(parse_int=_int)
