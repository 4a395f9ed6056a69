"""The `pairs` format: a chosen and a rejected answer to the same prompt, as JSON Lines or a JSON array.

{"prompt": [{"role": "user", "content": "Hello."}],
 "chosen": [{"role": "assistant", "content": {"type": "audio", "audio_url": "clips/0-3.wav"}}],
 "rejected": [{"role": "assistant", "content": {"type": "audio", "audio_url": "clips/0-1.wav"}}],
 "speaker": "anna", "scores": {...}, "margin": 0.4}

The messages are those of the `chatml` format; `prompt`, `chosen` and `rejected` are named as in TRL. Each line yields
two samples, the chosen one first. Other keys, such as scores, are ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from higgs_ds.data.formats import chatml
from higgs_ds.data.formats.checks import Reading, check_keys, kind_of, read_items
from higgs_ds.data.formats.jsonio import Item, Line, json_items
from higgs_ds.data.formats.turns import messages_of
from higgs_ds.model.sample import Entry, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

CHOSEN, REJECTED = "chosen", "rejected"
KEYS = ("prompt", CHOSEN, REJECTED, "speaker", "language", "misc", "scores", "margin", "source")


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of a file of pairs, two for each. Faults of a pair are those of its first entry."""
    return (entry for item in json_items(path) for entry in _entries(path, item, options))


def _entries(path: Path, item: Item | Line, options: DataOptions) -> Iterator[PendingEntry]:
    of_both = [next(read_items(path, [item], options, functools.partial(build, answer=a))) for a in (CHOSEN, REJECTED)]
    yield functools.partial(_chosen, *of_both)
    yield functools.partial(_rejected, *of_both)


def _chosen(chosen: PendingEntry, rejected: PendingEntry) -> Entry:
    first, second = chosen(), rejected()
    faults = tuple(dict.fromkeys(first.faults + second.faults))
    return Entry(first.source, None if faults else first.sample, faults)


def _rejected(chosen: PendingEntry, rejected: PendingEntry) -> Entry:
    first, second = chosen(), rejected()
    return Entry(second.source, None if first.faults or second.faults else second.sample)


def build(raw: Any, reading: Reading, answer: str) -> Sample | None:
    """Build the sample of one answer from the JSON value of a pair."""
    if not isinstance(raw, dict):
        reading.report("pair", f"must be an object with prompt, {CHOSEN} and {REJECTED}, but is {kind_of(raw)}")
        return None
    check_keys(raw, KEYS, "", reading)
    prompt, answered = (messages_of(raw.get(key), chatml.DIALECT, reading, key) for key in ("prompt", answer))
    speaker, language = chatml.speaker_and_language(raw, reading)
    return Sample(prompt + answered, len(prompt), speaker, reading.source, language)
