"""A list of clips under review: its texts are corrected and its clips dropped, and every change is written at once.

Beside `metadata.jsonl`, the first change leaves a copy of it as `metadata.jsonl.orig`. A dropped clip moves from the
list into `metadata.jsonl.dropped`, so that it is not trained, by this trainer or by another; its audio file stays.
Everything that is not changed keeps its bytes and its order, also where a clip is taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higgs_ds.common.console import warn
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import replaced_file, saving, write_json, write_text
from higgs_ds.common.lock import OutputLock, lock_beside, locked
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.jsonio import is_utf8
from higgs_ds.data.formats.reader import AUTO
from higgs_ds.model.sample import AudioClip, Entry
from higgs_ds.reviewing.forms import file_of, form_of
from higgs_ds.reviewing.pieces import Form, Pair, Pieces

LARGEST_LIST = 1 << 29  # bytes; a list is held in memory
KEPT, DROPPED, ALL = SHOWN = ("kept", "dropped", "all")
STAND_IN = "x"  # a transcript that has no fault


class StaleError(InputError):
    """A change that was made to an older state of the list than the present one."""


@dataclass(frozen=True)
class Row:
    """A clip of the list: its piece of the file, and its transcript, None if it has none that could be changed."""

    piece: str
    text: str | None
    is_dropped: bool = False


class ReviewList:
    """The clips of a list, kept and dropped, numbered from 0. Its methods may be called from several threads.

    A number stays valid as long as `generation` does, which changes if another program has changed the list.
    """

    def __init__(self, path: Path, format_name: str = AUTO, lock: OutputLock | None = None) -> None:
        """Open the list in a file.

        Args:
            lock: of the list, checked before every change.

        Raises:
            InputError: it cannot be read, or not written back without loss; says what to do.
        """
        self.path, self.format_name, self.lock = path, format_name, lock
        self.writing = threading.RLock()
        self.generation = 0
        with _as_input_error(path):
            self.real = path.resolve(strict=True)
            self._load()
        self.position = self._read_position()

    def _beside(self, suffix: str) -> Path:
        return self.real.with_name(f"{self.real.name}.{suffix}")

    @property
    def _position_file(self) -> Path:
        return self.real.with_name(f".{self.real.name}.position")

    def _load(self) -> None:
        form = form_of(self.path, self.format_name)
        with self.real.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            if stamp[1] > LARGEST_LIST:
                raise InputError(f"is larger than {LARGEST_LIST >> 20} MiB; split it, and review the parts")
            pieces = form.split(file.read().decode("utf-8", "surrogateescape"))
        dropped, num_rows = _read_dropped(self._beside("dropped"))
        self.rows = _merged(form, pieces.clips, dropped, num_rows)
        self._is_unfinished = self.num_dropped() < len(dropped)
        self.form, self._stamp, self._head, self._tail = form, stamp, pieces.head, pieces.tail

    def refresh(self) -> None:
        """Read the list again if another program has changed it. Raises InputError if it is no longer valid."""
        with self.writing, _as_input_error(self.path):
            if _stamp(self.real.stat()) != self._stamp:
                self.generation += 1
                self._load()

    def check(self, generation: int) -> None:
        """Raise StaleError if the numbers of rows that a page holds are those of an older state of the list."""
        self.refresh()
        if generation != self.generation:
            raise StaleError("the list was changed by another program; nothing was written. It has been read again")

    def num_dropped(self) -> int:
        return sum(row.is_dropped for row in self.rows)

    def find(self, words: str = "", shown: str = ALL) -> list[int]:
        """Return the numbers of the rows whose text contains `words`, ignoring case, among those that are `shown`."""
        words = words.casefold()
        return [
            number
            for number, row in enumerate(self.rows)
            if (shown == ALL or row.is_dropped == (shown == DROPPED)) and words in (row.text or "").casefold()
        ]

    def entry(self, number: int) -> Entry:
        """Return what the training makes of a row: a sample, or faults."""
        return self._entry(self.rows[number].piece)

    def _entry(self, piece: str) -> Entry:
        if not is_utf8(piece):
            return Entry(printable(self.path), None, ("line: not UTF-8; save the file as UTF-8",))
        return self.form.entry(piece, self.path)

    def clip(self, number: int) -> AudioClip | None:
        """Return the clip of a row, also if its transcript has a fault."""
        row, sample = self.rows[number], self.entry(number).sample
        if sample is None and row.text is not None and self.form.is_editable:
            sample = self.form.entry(self.form.with_text(row.piece, STAND_IN), self.path).sample
        return None if sample is None else sample.clips[-1]

    def pair(self, number: int) -> Pair | None:
        """Return the clips of a row of preference pairs; None in a list of clips."""
        return self.form.pair(self.rows[number].piece, self.path)

    def edit(self, number: int, text: str, before: str) -> None:
        """Replace the transcript of a row.

        Raises:
            StaleError: its transcript is no longer `before`.
            InputError: the reader would refuse the transcript, or the row is dropped.
            SaveError: the list cannot be written.
        """
        with self.writing:
            row, text = self.rows[number], text.strip()
            if not self.form.is_editable:
                raise InputError("the text of a pair is what was spoken; it cannot be changed")
            if row.text != before:
                raise StaleError("the text was changed in another window; nothing was written")
            if row.is_dropped or row.text is None:
                raise InputError("the clip is dropped; keep it first" if row.is_dropped else "the row has no text")
            if text == row.text:
                return
            if not is_utf8(text):
                raise InputError("text: contains half of a surrogate pair; correct it")
            new = Row(self.form.with_text(row.piece, text), text)
            self._check_edit(number, new)
            self._write(number, new)

    def swap(self, number: int, before: str) -> None:
        """Swap the chosen and the rejected clip of a pair.

        Raises:
            StaleError: the chosen clip is no longer `before`.
            InputError: the row is no pair, or is dropped.
            SaveError: the list cannot be written.
        """
        with self.writing:
            row, pair = self.rows[number], self.pair(number)
            swapped = self.form.swapped(row.piece)
            if pair is None or pair.chosen != before:
                raise StaleError("the pair was swapped in another window; nothing was written")
            if row.is_dropped:
                raise InputError("the pair is dropped; keep it first")
            self._write(number, replace(row, piece=swapped))

    def _check_edit(self, number: int, new: Row) -> None:
        """Refuse a text that the reader would refuse, or that would change more than the transcript."""
        before, after = self.entry(number), self._entry(new.piece)
        faults = [fault for fault in after.faults if fault not in before.faults]
        if faults:
            raise InputError(faults)
        if self.form.text(new.piece) != new.text:
            raise InputError("text: would be read differently than written; change it")
        if before.sample and after.sample:
            same = [(s.clips, s.speaker, s.language, s.start_index) for s in (before.sample, after.sample)]
            assert same[0] == same[1]

    def drop(self, number: int, is_dropped: bool) -> None:
        """Take a row out of the list, or put it back in its place.

        Raises:
            InputError: it is the last one, or the list would be read differently without it.
            SaveError: the list cannot be written.
        """
        with self.writing:
            row = self.rows[number]
            if row.is_dropped == is_dropped:
                return
            if is_dropped and self.num_dropped() == len(self.rows) - 1:
                raise InputError("the last clip cannot be dropped: a list must contain one")
            self._write(number, replace(row, is_dropped=is_dropped))

    def _write(self, number: int, new: Row) -> None:
        """Write a list in which one row is another.

        Of a dropped row, at least one of the two files has it at any moment; if both have, it is in the list.
        """
        rows, before = [*self.rows], self.rows[number]
        rows[number] = new
        pieces = [row.piece for row in rows if not row.is_dropped]
        text = self.form.join(Pieces(self._head, pieces, self._tail))
        with saving(self.real):
            self._check_unchanged()
            if self._is_unfinished:
                self._write_dropped(self.rows)
                self._is_unfinished = False
            mode = self.real.stat().st_mode & 0o777
            if not self._beside("orig").exists():
                with replaced_file(self._beside("orig")) as temporary:
                    shutil.copyfile(self.real, temporary)
            with replaced_file(self.real) as temporary:
                temporary.write_bytes(text.encode("utf-8", "surrogateescape"))
                if form_of(temporary, self.format_name) != self.form:
                    raise InputError("this change would make the reader take the list for one of another form; undo it")
                if new.is_dropped:
                    self._write_dropped(rows)
                self._check_unchanged()
                stamp = _stamp(temporary.stat())
            self.real.chmod(mode)
            self.rows, self._stamp = rows, stamp
            if before.is_dropped:
                self._write_dropped(rows)

    def _check_unchanged(self) -> None:
        """Raise StaleError if another program has changed the list, SaveError if it has taken the lock."""
        if self.lock is not None:
            self.lock.check()
        self.check(self.generation)

    def _write_dropped(self, rows: list[Row]) -> None:
        """Write the dropped rows with their numbers, and the number of all rows."""
        lines = [
            json.dumps({"row": number, "of": len(rows), "line": row.piece})
            for number, row in enumerate(rows)
            if row.is_dropped
        ]
        if lines:
            write_text(self._beside("dropped"), "".join(f"{line}\n" for line in lines))
        else:
            self._beside("dropped").unlink(missing_ok=True)

    def move_to(self, number: int) -> None:
        """Remember the row at which the next review begins."""
        with self.writing:
            if number != self.position:
                self.position = number
                with contextlib.suppress(OSError):  # a review on a full disk begins elsewhere
                    write_json(self._position_file, number)

    def _read_position(self) -> int:
        try:
            position: Any = json.loads(self._position_file.read_bytes())
        except (OSError, ValueError):
            return 0
        return position if isinstance(position, int) and 0 <= position < len(self.rows) else 0


@contextlib.contextmanager
def opened_list(path: Path, format_name: str = AUTO) -> Iterator[ReviewList]:
    """Open a list, or the list in a folder, and hold its lock within the block.

    Raises:
        InputError: as `ReviewList`; or another process reviews it.
        SaveError: nothing can be written beside it.
    """
    with _as_input_error(path):
        file = file_of(path, format_name)
        real = file.resolve(strict=True)
        if not os.access(real, os.W_OK):
            raise InputError("is read-only, but changes are written into it; change its mode, or review a copy")
    with locked(lock_beside(real), str(path), warn) as lock:
        yield ReviewList(file, format_name, lock)


def _merged(form: Form, kept: list[str], dropped: list[tuple[int, str]], num_rows: int) -> list[Row]:
    """Return the rows of a list in order: those that are in it, and the dropped ones at their numbers.

    A row that is in both files is kept: a process was killed between writing one and the other, or the list has been
    made again. That there is such a row is known from the number of all rows when a row was last dropped.
    """
    rows: list[Row] = []
    num_twice = len(kept) + len(dropped) - num_rows
    waiting = deque(dropped)

    def add_dropped(before: str | None) -> None:
        nonlocal num_twice
        while waiting and (before is None or waiting[0][0] <= len(rows)):
            _, piece = waiting.popleft()
            if num_twice > 0 and before is not None and form.record(before) == form.record(piece):
                num_twice -= 1
            else:
                rows.append(Row(piece, form.text(piece), is_dropped=True))

    for piece in kept:
        add_dropped(piece)
        rows.append(Row(piece, form.text(piece)))
    add_dropped(None)
    return rows


def _read_dropped(path: Path) -> tuple[list[tuple[int, str]], int]:
    """Return the dropped rows of a list in order, each with its number among all rows, and the number of all rows."""
    if not path.exists():
        return [], 0
    try:
        values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        dropped = sorted((int(value["row"]), str(value["line"])) for value in values)
        return dropped, max((int(value["of"]) for value in values), default=0)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} does not hold dropped clips of this list ({error}); move it away") from error


@contextlib.contextmanager
def _as_input_error(path: Path) -> Iterator[None]:
    """Raise what prevents a list from being read as InputError that names it."""
    try:
        yield
    except InputError as error:
        raise InputError([f"{path}: {problem}" for problem in error.problems]) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
