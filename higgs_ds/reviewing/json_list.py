"""Flat JSON lists in pieces: JSON Lines and JSON arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import flat
from higgs_ds.data.formats.checks import printable
from higgs_ds.model.sample import Entry
from higgs_ds.reviewing.pieces import BLANK, MARK, Form, Pieces, entry_of, lines_as_pieces


@dataclass(frozen=True)
class JsonLines(Form):
    """JSON Lines."""

    def split(self, text: str) -> Pieces:
        return lines_as_pieces(text)

    def record(self, piece: str) -> str:
        return piece.partition("\n")[0]

    def entry(self, piece: str, path: Path) -> Entry:
        try:
            value = json.loads(self.record(piece))
        except (ValueError, RecursionError) as error:
            return Entry(printable(path), None, (f"not JSON: {error}",))
        return entry_of(value, path, flat.build)

    def text(self, piece: str) -> str | None:
        key = self._text_key(piece)
        return None if key is None else key[1]

    def with_text(self, piece: str, text: str) -> str:
        name, _ = self._text_key(piece) or ("", "")
        spans = [(start, end) for key, start, end in _members(piece) if key.strip().casefold() == name]
        start, end = spans[-1]  # of a key that is repeated, JSON takes the last
        is_ascii = piece.isascii() and "\\u" in piece
        return piece[:start] + json.dumps(text, ensure_ascii=is_ascii) + piece[end:]

    def _text_key(self, piece: str) -> tuple[str, str] | None:
        """Return the name of the key that the reader takes the transcript from, and the transcript."""
        try:
            value = json.loads(self.record(piece))
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        folded = {name.strip().casefold(): held for name, held in value.items()}
        keys = flat.keys_of(tuple(name for name, held in folded.items() if held is not None))
        if isinstance(keys, str) or not isinstance(folded[keys.text], str):
            return None
        return keys.text, folded[keys.text]


@dataclass(frozen=True)
class JsonArray(JsonLines):
    """A JSON array."""

    def split(self, text: str) -> Pieces:
        try:
            return self._split(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a complete JSON array ({error}); correct it first") from error

    def _split(self, text: str) -> Pieces:
        start = _past_blank(text, len(MARK) if text.startswith(MARK) else 0)
        if text[start : start + 1] != "[":
            raise ValueError("no '[' at the beginning")
        start = _past_blank(text, start + 1)
        head, clips, separator = text[:start], [], ","
        while separator == ",":
            _, end = _DECODER.raw_decode(text, start)
            after = _past_blank(text, end)
            separator = text[after : after + 1]
            following = _past_blank(text, after + 1)
            clips.append(text[start : following if separator == "," else end])
            start = following
        if separator != "]" or following < len(text):
            raise ValueError(f"expected ',' or ']', found {separator!r}, at character {after + 1}")
        return Pieces(head, clips, text[end:])

    def join(self, pieces: Pieces) -> str:
        records = [self.record(piece) for piece in pieces.clips]
        ends = [piece[len(record) :] for piece, record in zip(pieces.clips, records, strict=True)]
        usual = next(filter(None, ends), ",\n")  # for a piece that has none, as it was the last one
        ended = [record + (end or usual) for record, end in zip(records[:-1], ends, strict=False)]
        return "".join([pieces.head, *ended, records[-1], pieces.tail])

    def record(self, piece: str) -> str:
        return piece.rstrip(f"{BLANK},")


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each member of a JSON object, and where its value begins and ends."""
    at = _past_blank(text, text.index("{") + 1)
    while text[at] == '"':
        name, at = _DECODER.raw_decode(text, at)
        at = _past_blank(text, text.index(":", at) + 1)
        _, end = _DECODER.raw_decode(text, at)
        yield name, at, end
        at = _past_blank(text, end)
        at = _past_blank(text, at + 1) if text[at] == "," else at


def _past_blank(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in BLANK:
        at += 1
    return at


_DECODER = json.JSONDecoder()
