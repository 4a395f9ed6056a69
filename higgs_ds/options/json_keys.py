"""Find the line of every key in a JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')


class Key(NamedTuple):
    """A key with the keys of the sections around it, from the outside in, and its line."""

    keys: tuple[str, ...]
    line: int


def keys_of(text: str) -> Iterator[Key]:
    """Yield every key of a valid JSON text, in order; a key that is given twice is yielded twice."""
    path: list[str] = []  # for each open object or list: the key that is being read, or the bracket if there is none
    line, counted_to, string = 1, 0, ""
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == ":":
            path[-1] = json.loads(string)
            yield Key(tuple(path), line)
        elif token in ("{", "["):
            if path and path[-1].startswith("["):
                path[-1] = f"[{match.start()}]"  # objects in a list may have the same keys
            path.append(token)
        elif token in ("}", "]"):
            path.pop()
        else:
            line += text.count("\n", counted_to, match.start())
            counted_to, string = match.start(), token
