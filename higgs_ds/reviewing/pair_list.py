"""Lists of preference pairs, one on each line, as launch/prefer.py writes them: both clips are heard and swapped."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from higgs_ds.common.errors import InputError
from higgs_ds.data.formats import pairs
from higgs_ds.data.formats.checks import printable
from higgs_ds.data.formats.pairs import CHOSEN, REJECTED
from higgs_ds.model.sample import USER, Entry
from higgs_ds.reviewing.json_list import JsonLines
from higgs_ds.reviewing.pieces import BLANK, Pair, entry_of

PAIRS_FILE = "pairs.jsonl"
KEYS = ("prompt", CHOSEN, REJECTED)


@dataclass(frozen=True)
class PairLines(JsonLines):
    """JSON Lines of pairs. Their texts are what was spoken, and cannot be changed."""

    noun = "pair"
    is_editable = False

    def entry(self, piece: str, path: Path) -> Entry:
        return self._entry(piece, path, CHOSEN)

    def _entry(self, piece: str, path: Path, which: str) -> Entry:
        value = _value_of(piece)
        if value is None:
            return Entry(printable(path), None, (f"not a JSON object with {', '.join(KEYS)}",))
        return entry_of(value, path, functools.partial(pairs.build, answer=which))

    def text(self, piece: str) -> str | None:
        value = _value_of(piece) or {"prompt": []}
        turns = [turn for turn in value["prompt"] if isinstance(turn, dict) and turn.get("role") == USER]
        content = turns[-1].get("content") if turns else None
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        return " ".join(text for text in texts if isinstance(text, str)) or None

    def with_text(self, piece: str, text: str) -> str:
        raise InputError("the text of a pair is what was spoken; it cannot be changed")

    def pair(self, piece: str, path: Path) -> Pair | None:
        value, sample = _value_of(piece), self._entry(piece, path, REJECTED).sample
        if value is None:
            return None
        chosen, rejected = (_scores(value, which) for which in (CHOSEN, REJECTED))
        facts = [f"margin {_shown(value['margin'])}"] if "margin" in value else []
        facts += [
            f"{name.replace('_', ' ')} {_shown(chosen.get(name))} / {_shown(rejected.get(name))}"
            for name in dict.fromkeys([*chosen, *rejected])
        ]
        return Pair(json.dumps(value[CHOSEN]), sample.clips[-1] if sample and sample.clips else None, ", ".join(facts))

    def swapped(self, piece: str) -> str:
        value = _value_of(piece)
        if value is None:
            raise InputError(f"the line is not a JSON object with {', '.join(KEYS)}")
        for holder in (value, value.get("scores")):
            if isinstance(holder, dict) and CHOSEN in holder and REJECTED in holder:
                holder[CHOSEN], holder[REJECTED] = holder[REJECTED], holder[CHOSEN]
        if isinstance(value.get("margin"), int | float):
            value["margin"] = -value["margin"]
        record = self.record(piece).rstrip(BLANK)
        return json.dumps(value, ensure_ascii=False) + piece[len(record) :]


def is_pair_list(path: Path) -> bool:
    """Return whether the first line of a file is a pair. Raises OSError."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        first = next(itertools.islice((line for line in file if line.strip()), 1), "")
    return first.lstrip().startswith("{") and _value_of(first) is not None


def _value_of(piece: str) -> dict[str, Any] | None:
    """Return the JSON value of a line; None if it is not a pair of lists of messages after one."""
    try:
        value = json.loads(piece.partition("\n")[0])
    except (ValueError, RecursionError):
        return None
    is_pair = isinstance(value, dict) and all(isinstance(value.get(key), list) for key in KEYS)
    return value if is_pair else None


def _scores(value: dict[str, Any], which: str) -> dict[str, Any]:
    scores = value.get("scores")
    found = scores.get(which) if isinstance(scores, dict) else None
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
