"""The lists whose clips can be reviewed, cut into one piece of text per clip, of which only the transcript is replaced.

A list is its head, the pieces of its clips and its tail. A piece holds everything up to the next one: the line end and
blank lines, in an array the comma. Joined unchanged, they are the file, byte by byte. What a piece means to the
training is asked of the reader of its format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats.checks import Build, Reading, build_entry, printable
from higgs_ds.model.sample import AudioClip, Entry
from higgs_ds.options.train import DataOptions

LINE = re.compile(r"[^\n]*\n|[^\n]+")
BLANK = " \t\n\r"
MARK = "\ufeff"  # of UTF-8, which some editors write at the beginning


class Pieces(NamedTuple):
    """A list as its head, one piece per clip, and its tail."""

    head: str
    clips: list[str]
    tail: str = ""


class Pair(NamedTuple):
    """What a piece says of its two clips: which is chosen, the rejected one, and their scores in words."""

    chosen: str
    rejected: AudioClip | None
    scores: str


@dataclass(frozen=True)
class Form:
    """How a list is written. Two forms are equal if they read the same text alike."""

    noun: ClassVar[str] = "clip"
    is_editable: ClassVar[bool] = True  # whether transcripts can be changed

    def split(self, text: str) -> Pieces:
        """Cut the text of a list. Raises InputError if that is not possible."""
        raise NotImplementedError

    def join(self, pieces: Pieces) -> str:
        """Put a list together, of which pieces may have been removed."""
        ended = [piece if piece.endswith("\n") else f"{piece}\n" for piece in pieces.clips[:-1]]
        return "".join([pieces.head, *ended, *pieces.clips[-1:], pieces.tail])

    def record(self, piece: str) -> str:
        """Return a piece without what separates it from the next."""
        return piece.rstrip(BLANK)

    def entry(self, piece: str, path: Path) -> Entry:
        """Return what the reader of the format makes of a piece of the list at `path`."""
        raise NotImplementedError

    def text(self, piece: str) -> str | None:
        """Return the transcript in a piece, as it is written there; None if it has none."""
        raise NotImplementedError

    def with_text(self, piece: str, text: str) -> str:
        """Return a piece with another transcript. Raises InputError if the form cannot hold it."""
        raise NotImplementedError

    def pair(self, piece: str, path: Path) -> Pair | None:
        """Return the two clips of a preference pair; None in a list of clips."""
        return None

    def swapped(self, piece: str) -> str:
        """Return a pair whose clips are swapped. Raises InputError if it is none."""
        raise InputError("only the clips of a preference pair can be swapped")


def entry_of(value: Any, path: Path, build: Build) -> Entry:
    """Return what a reader's `build` makes of a value of the list at `path`."""
    return build_entry(value, Reading(path, printable(path), DataOptions()), build)


def lines_as_pieces(text: str) -> Pieces:
    """Cut lines, each with the blank ones after it; only a line feed ends a line, as for the readers."""
    head, clips = MARK if text.startswith(MARK) else "", list[str]()
    for line in LINE.findall(text[len(head) :]):
        if line.strip():
            clips.append(line)
        elif clips:
            clips[-1] += line
        else:
            head += line
    return Pieces(head, clips)
