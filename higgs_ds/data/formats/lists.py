"""The `list` format: file lists of text-to-speech trainers, one line per clip, `|` between the fields, no header.

clips/a.wav|Good morning.
clips/b.wav|Good evening.

The layout of the fields is detected from the first lines of the file and must be the same on every line:

    path|text                      most trainers
    path|text|speaker              StyleTTS 2
    path|speaker|text              VITS (speakers are often numbers)
    id|text|normalized text        LJSpeech (the normalized text is what is spoken, and is used)
    path|speaker|language|text     Bert-VITS2, GPT-SoVITS

A path without an audio suffix is an id: it means `wavs/ID.wav` if a folder `wavs` exists, else `ID.wav`.
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
from higgs_ds.model.sample import Entry, Sample
from higgs_ds.options.train import DataOptions

HEAD = 1000  # lines from which the layout is detected
AUDIO, TEXT, SPEAKER, LANGUAGE, UNREAD = "path", "text", "speaker", "language", "unread"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]+)*")


def read(path: Path, options: DataOptions) -> Iterator[Entry]:
    """Yield the entries of a file list."""
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
                fault = (
                    f"line: has {len(fields)} fields, but the first lines of the file have {len(layout)} "
                    f"({'|'.join(layout)}); correct this line"
                )
                yield Entry(source, None, (fault,))
            else:
                row = dict(zip(layout, fields, strict=True))
                yield build_entry(row, Reading(path, source, options), build)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split("|")]


def build(row: Any, reading: Reading) -> Sample | None:
    """Build one sample from its fields by name."""
    path = path_of(row[AUDIO], AUDIO, reading)
    if path is not None and path.suffix.lower() not in AUDIO_SUFFIXES:
        folder = reading.folder / "wavs"
        path = (folder if folder.is_dir() else reading.folder) / f"{row[AUDIO]}.wav"
    words = words_of(row[TEXT], TEXT, reading)
    speaker, language = (name_of(row, (key,), reading) for key in (SPEAKER, LANGUAGE))
    return sample_of(clip_of(path), words, speaker, language, reading)


def layout_of(rows: list[list[str]]) -> tuple[str, ...] | str:
    """Detect the layout of the fields from the first rows.

    Returns:
        The name of each field, or, as a string, why the layout could not be detected.
    """
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
        f"cannot detect what the {num_fields} fields between '|' mean; make the first line a header that names them, "
        "such as audio|text|speaker"
    )


def _same_texts(rows: list[list[str]]) -> bool:
    """Return whether the second and third fields spell the same text, judged by the pairs of letters they share."""
    shares = []
    for _, first, second in rows:
        first_pairs, second_pairs = (
            set(zip(text.casefold(), text.casefold()[1:], strict=False)) for text in (first, second)
        )
        shares.append(len(first_pairs & second_pairs) / max(len(first_pairs), len(second_pairs), 1))
    return sum(shares) > len(shares) / 2


def _speaker_field(rows: list[list[str]]) -> int | None:
    """Return the index of the speaker field, 1 or 2: the one with names, numbers or few values; None if unclear."""
    columns = {i: [row[i] for row in rows if row[i]] for i in (1, 2)}
    for is_name in (_NAME.fullmatch, str.isdecimal):
        found = [i for i, column in columns.items() if all(map(is_name, column))]
        if len(found) == 1:
            return found[0]
        if found and is_name == str.isdecimal:
            return None
    if all(map(_NAME.fullmatch, itertools.chain(*columns.values()))):
        return None  # single words in both fields: a wrong guess would train on names as if they were texts
    few, many = sorted(columns, key=lambda i: len(set(columns[i])))
    return few if len(set(columns[few])) * 2 <= len(set(columns[many])) else None
