"""File lists of text to speech trainers: a line for each clip, `|` between its fields, no header.

clips/a.wav|Good morning.
clips/b.wav|Good evening.

Which fields there are is told from the first lines of the file, and is the same for all of them:

    path|text                      most trainers
    path|text|speaker              StyleTTS 2
    path|speaker|text              VITS (speakers are often numbers)
    id|text|normalized text        LJSpeech (the normalized text is what is said, and is taken)
    path|speaker|language|text     Bert-VITS2, GPT-SoVITS

A path without an audio suffix is an id: `wavs/ID.wav` where there is a folder `wavs`, else `ID.wav`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats.checks import Reading, build_entry, name_of, path_of, printable
from higgs_ds.data.formats.csv_file import FILE_NAME
from higgs_ds.data.formats.jsonio import text_lines
from higgs_ds.data.formats.recordings import AUDIO_SUFFIXES, clip_of, sample_of, words_of
from higgs_ds.data.sample import Entry, Sample
from higgs_ds.options.train import DataOptions

HEAD = 1000  # lines that the fields are told from
AUDIO, TEXT, SPEAKER, LANGUAGE, UNREAD = "path", "text", "speaker", "language", "unread"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]+)*")


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """The entries of a file list."""
    path = path / FILE_NAME if path.is_dir() else path
    head = (line.text.strip() for line in text_lines(path))
    rows = [_fields(line) for line in itertools.islice(filter(None, head), HEAD)]
    if not rows:
        return
    layout = layout_of(rows)
    if isinstance(layout, str):
        yield Entry(printable(path), None, (f"fields: {layout}",))
        return
    shown_path = printable(path)
    for line in text_lines(path):
        source, fields = f"{shown_path}:{line.number}", _fields(line.text)
        if line.fault:
            yield Entry(source, None, (f"line: {line.fault}",))
        elif line.text.strip():
            if len(fields) != len(layout):
                fault = f"line: has {len(fields)} fields, the file's first lines have {len(layout)}: {'|'.join(layout)}"
                yield Entry(source, None, (fault,))
            else:
                row = dict(zip(layout, fields, strict=True))
                yield build_entry(row, Reading(path, source, options), _build)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split("|")]


def _build(row: Any, reading: Reading) -> Sample | None:
    path = path_of(row[AUDIO], AUDIO, reading)
    if path is not None and path.suffix.lower() not in AUDIO_SUFFIXES:
        folder = reading.folder / "wavs"
        path = (folder if folder.is_dir() else reading.folder) / f"{row[AUDIO]}.wav"
    words = words_of(row[TEXT], TEXT, reading)
    speaker, language = (name_of(row, (key,), reading) for key in (SPEAKER, LANGUAGE))
    return sample_of(clip_of(path), words, speaker, language, reading)


def layout_of(rows: list[list[str]]) -> tuple[str, ...] | str:
    """What the fields of these lines are; or, as a text, why that cannot be told."""
    num_fields = Counter(map(len, rows)).most_common(1)[0][0]
    rows = [row for row in rows if len(row) == num_fields]
    if num_fields == 2:
        return AUDIO, TEXT
    if num_fields == 3:
        if _same_texts(rows):
            return AUDIO, UNREAD, TEXT
        speaker = _speaker_field(rows)
        if speaker is not None:
            return (AUDIO, SPEAKER, TEXT) if speaker == 1 else (AUDIO, TEXT, SPEAKER)
    if num_fields == 4 and all(_LANGUAGE.fullmatch(row[2]) for row in rows):
        return AUDIO, SPEAKER, LANGUAGE, TEXT
    return (
        f"cannot tell what the {num_fields} fields between '|' are; make the first line a header that names them, "
        "such as audio|text|speaker"
    )


def _same_texts(rows: list[list[str]]) -> bool:
    """Whether the second and third fields are two spellings of one text, by the pairs of letters they share."""
    shares = []
    for _, first, second in rows:
        one, other = (set(zip(text.casefold(), text.casefold()[1:], strict=False)) for text in (first, second))
        shares.append(len(one & other) / max(len(one), len(other), 1))
    return sum(shares) > len(shares) / 2


def _speaker_field(rows: list[list[str]]) -> int | None:
    """Which of the second and third fields names the speaker: the one of names, of numbers, or of few values."""
    columns = {i: [row[i] for row in rows if row[i]] for i in (1, 2)}
    for is_name in (_NAME.fullmatch, str.isdecimal):
        found = [i for i, column in columns.items() if all(map(is_name, column))]
        if len(found) == 1:
            return found[0]
        if found and is_name == str.isdecimal:
            return None
    if all(map(_NAME.fullmatch, itertools.chain(*columns.values()))):
        return None  # single words on either side: a wrong guess would train names as texts
    few, many = sorted(columns, key=lambda i: len(set(columns[i])))
    return few if len(set(columns[few])) * 2 <= len(set(columns[many])) else None
