"""Read lines, JSON Lines and JSON arrays value by value, with line numbers, in bounded memory.

[                                    <- JSON array: each value is reported with the line on which it begins
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
LONGEST = 1 << 28  # bytes of a line, characters of a value: enough for ten minutes of stereo audio in base64
LONGEST_INT = 300  # digits; a longer number does not fit a float, and takes quadratic time to parse
LONGEST_LITERAL = len("-Infinity") + 1  # an error this close to the end of a window may come from the cut
_BLANK = re.compile(r"[ \t\n\r]*")


class Line(NamedTuple):
    """A line of text with its line end, and its fault if any. Bytes that are not UTF-8 become lone surrogates."""

    number: int
    text: str
    fault: str | None = None


class Item(NamedTuple):
    """A value and the line on which it begins, or the fault on that line."""

    line: int
    value: Any
    fault: str | None = None


class InvalidJsonError(Exception):
    """The text is not JSON from `line` on."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"not JSON: {what}")
        self.line = line


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, which means that it contains no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file. Only a line feed ends a line: strings and transcripts may hold other separators."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST):
            number += 1
            if len(raw) == LONGEST and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(CHUNK)
                yield Line(number, "", f"the line is longer than the limit of {LONGEST >> 20} MiB")
                continue
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield Line(number, raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"
                yield Line(number, raw.decode("utf-8", "surrogateescape"), fault)


def json_items(path: Path) -> Iterator[Item | Line]:
    """Yield the values of a JSON array if the text begins with a bracket, else the lines of JSON Lines, to be parsed.

    Blank lines are skipped.
    """
    if first_character(path) == "[":
        return array_items(path)
    return (line for line in text_lines(path) if line.fault or line.text.strip())


def first_character(path: Path) -> str:
    """Return the first character that is not blank, or an empty string."""
    with path.open("rb") as file:
        return _Window(file).peek()


def parsed(item: Item | Line) -> Item:
    """Return the value of a line of JSON Lines; a value that is parsed is returned unchanged."""
    if isinstance(item, Item):
        return item
    if item.fault:
        return Item(item.number, None, f"not JSON: {item.fault}")
    try:
        return Item(item.number, _DECODER.decode(item.text))
    except json.JSONDecodeError as error:
        return Item(item.number, None, f"not JSON: {error.msg} at character {error.colno} of the line")
    except RecursionError:
        return Item(item.number, None, "not JSON: lists or objects are nested too deeply")


def array_items(path: Path, member: str = "") -> Iterator[Item]:
    """Yield the values of the list in a file or, if the file contains an object, of the list under `member`."""
    with path.open("rb") as file:
        window = _Window(file)
        try:
            if window.peek() == "{":
                yield from _member_items(window, member)
            else:
                yield from _list_items(window)
            if window.peek():
                raise window.error("more text after the end of the list or object")
        except InvalidJsonError as error:
            yield Item(error.line, None, f"{error}; the rest of the file was not read")


def object_shape(path: Path, member: str) -> tuple[bool, bool]:
    """Return whether the object at the start of a file has a list under `member`, and whether it spans several lines.

    Raises:
        InvalidJsonError: the file does not begin with an object, or the object is incomplete.
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
    window.expect("[")
    if window.peek() == "]":
        window.expect("]")
        return
    while True:
        window.peek()
        line = window.line
        value, is_intact = window.value()
        yield Item(line, value, None if is_intact else "not JSON: not UTF-8; save the file as UTF-8")
        if window.expect(",]") == "]":
            return


def _member_items(window: _Window, member: str) -> Iterator[Item]:
    for name in _member_names(window):
        if name == member and window.peek() == "[":
            yield from _list_items(window)
        else:
            window.value()


def _member_names(window: _Window) -> Iterator[str]:
    """Yield the names in an object. The caller must read the value of each name before it asks for the next."""
    window.expect("{")
    if window.peek() == "}":
        window.expect("}")
        return
    while True:
        if window.peek() != '"':
            raise window.error("expected a name in double quotes")
        name, _ = window.value()
        window.expect(":")
        yield name
        if window.expect(",}") == "}":
            return


class _Window:
    """The part of a text file that is held in memory; it moves forward as values are read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._text, self._position, self._at_end = "", 0, False
        self.line = 1

    def error(self, what: str) -> InvalidJsonError:
        return InvalidJsonError(self.line, what)

    def peek(self) -> str:
        """Move to the next character that is not blank; return it, or an empty string at the end of the file."""
        while True:
            match = _BLANK.match(self._text, self._position)
            self._move_to(match.end() if match else self._position)
            if self._position < len(self._text) or not self._read_more():
                return self._text[self._position : self._position + 1]

    def expect(self, allowed: str) -> str:
        """Move past the next character, which must be one of `allowed`, and return it."""
        found = self.peek()
        if not found or found not in allowed:
            raise self.error(
                f"expected {' or '.join(map(repr, allowed))}, found {ascii(found) if found else 'the end of the file'}"
            )
        self._move_to(self._position + 1)
        return found

    def value(self) -> tuple[Any, bool]:
        """Move past the next value; return it, and whether its text is UTF-8."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_LITERAL
                if is_cut and self._read_more():
                    continue
                line = self.line + self._text.count("\n", self._position, error.pos)
                raise InvalidJsonError(self.line, f"{error.msg} in line {line}") from None
            except RecursionError:
                raise self.error("lists or objects are nested too deeply") from None
            if end > len(self._text) - LONGEST_LITERAL and self._read_more():
                continue  # a number may be incomplete: -1.5 may be the start of -1.5e-07
            is_intact = is_utf8(self._text[self._position : end])
            self._move_to(end)
            return value, is_intact

    def _move_to(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self) -> bool:
        """Read as much again as is held, so that a long value is not decoded many times. Return False at the end."""
        held = self._text[self._position :]
        if len(held) > LONGEST:
            raise self.error(f"the value is longer than the limit of {LONGEST >> 20} MiB")
        added = ""
        while not added and not self._at_end:
            raw = self._file.read(max(CHUNK, len(held)))
            self._at_end = not raw
            added = self._decode(raw, self._at_end)
        if added:
            self._text, self._position = held + added, 0
        return bool(added)


def _int(digits: str) -> float:
    if len(digits) <= LONGEST_INT:
        return int(digits)
    return -math.inf if digits.startswith("-") else math.inf


_DECODER = json.JSONDecoder(parse_int=_int)
