"""Texts to speak: where they come from, and how a long one is cut into chunks."""

from __future__ import annotations

import bisect
import re
from itertools import pairwise
from pathlib import Path

from higgs_ds.common.errors import InputError
from higgs_ds.data.references import SPEAKER_TAG
from higgs_ds.options.commands import GenerateOptions
from higgs_ds.options.generation import text_problems

LONGEST_FILE = 10 << 20  # bytes
# After `.`, `!`, `?` or an ellipsis and what closes quotes and brackets, where white space follows; a single letter
# with a dot is an initial. Full-width marks need no white space. An empty line or a tag ends a sentence, too.
_SENTENCE_END = re.compile(
    r"(?<=[.!?\u2026])(?<!\b[^\W\d_]\.)[\"'\u201d\u2019\u00bb)\]]*\s+|(?<=[\u3002\uff01\uff1f\uff61])[\u201d\u300d\u300f\uff09]*\s*|"
    rf"\s*\n\s*\n\s*|\s*(?={SPEAKER_TAG.pattern})"
)
_CLAUSE_END = re.compile(r"(?<=[,;:\u2014])\s+|(?<=[\uff0c\u3001\uff1b\uff1a])")
_SPACE = re.compile(r"\s+")


def texts_to_speak(options: GenerateOptions) -> dict[Path, str]:
    """Return the text of each file to write. Raises InputError with the problems of --text_file."""
    if options.text_file is None:
        return {options.output: options.text.strip()}
    where = f"--text_file {options.text_file}"
    text = _read(options.text_file, where)
    if not options.each_line:
        problems = text_problems(where, text)
        if problems:
            raise InputError(problems)
        return {options.output: text.strip()}
    lines = text.splitlines()
    width = len(str(len(lines)))
    spoken = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    problems = [problem for number, line in spoken.items() for problem in text_problems(f"{where}:{number}", line)]
    if problems:
        raise InputError(problems)
    output = options.output
    return {
        output.with_name(f"{output.stem}-{number:0{width}}{output.suffix}"): line for number, line in spoken.items()
    }


def _read(path: Path, where: str) -> str:
    if path.exists() and not path.is_file():
        raise InputError(f"{where}: is not a file")
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if len(content) > LONGEST_FILE:
        raise InputError(f"{where}: has more than {LONGEST_FILE >> 20} MiB; give a part of it")
    if not text.strip():
        raise InputError(f"{where}: is empty")
    return text


def chunks_of(text: str, longest: int) -> list[str]:
    """Cut a text into as few chunks as fit, of about equal length, at ends of sentences where possible.

    Sentences that are too long are cut at ends of clauses, then between words, then anywhere. A chunk that begins
    within what one speaker says gets the tag of the speaker again, which may make it longer.
    """
    pieces = _pieces(text.strip(), longest)
    fewest = len(_packed(pieces, longest))
    limit = bisect.bisect_left(range(longest), -fewest, key=lambda limit: -len(_packed(pieces, limit)))
    chunks, tag = [], ""
    for packed in _packed(pieces, limit):
        chunk = re.sub(r"\s*\n\s*", "\n", packed.strip())
        chunks.append(chunk if SPEAKER_TAG.match(chunk) or not tag else f"{tag} {chunk}")
        tag = [tag, *SPEAKER_TAG.findall(chunk)][-1]
    return chunks


def _packed(pieces: list[str], limit: int) -> list[str]:
    """Join pieces in order into chunks of up to `limit` characters; longer pieces are chunks of their own."""
    packed: list[str] = []
    for piece in pieces:
        if packed and len((packed[-1] + piece).rstrip()) <= limit:
            packed[-1] += piece
        else:
            packed.append(piece)
    return packed


def _pieces(text: str, longest: int) -> list[str]:
    """Return sentences, or their parts where they are too long, each with the white space after it."""
    pieces = _cut(text, _SENTENCE_END)
    for pattern in (_CLAUSE_END, _SPACE):
        pieces = [part for p in pieces for part in ([p] if len(p.rstrip()) <= longest else _cut(p, pattern))]
    pieces = [part for p in pieces for part in ([p] if len(p.rstrip()) <= longest else _sliced(p, longest))]
    joined: list[str] = []
    for piece in pieces:  # a tag stays with the words after it
        if joined and not SPEAKER_TAG.sub("", joined[-1]).strip():
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _cut(text: str, end: re.Pattern[str]) -> list[str]:
    """Cut a text after each match; not before a small letter, with which no sentence begins."""
    at = {found.end() for found in end.finditer(text)}
    if end is _SENTENCE_END:
        at = {i for i in at if not text[i : i + 1].islower()}
    bounds = [0, *sorted(at - {0, len(text)}), len(text)]
    return [text[start:stop] for start, stop in pairwise(bounds)]


def _sliced(piece: str, longest: int) -> list[str]:
    body = piece.rstrip()
    slices = [body[start : start + longest] for start in range(0, len(body), longest)]
    return [*slices[:-1], slices[-1] + piece[len(body) :]]
