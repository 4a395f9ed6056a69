"""Count the tokens of many texts by their words: most words have been counted before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, models

MAX_WORDS = 1 << 15  # that are remembered
LONGEST_WORD = 32  # characters; texts with longer ones are tokenized as a whole
_WORD = re.compile(r" ?\S+")
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How these tokenizers split a text before anything else. A space before another character always begins a part: parts
# have a space elsewhere only within white space, and do not depend on what precedes them.
SPLIT_AT_SPACES: tuple[dict[str, Any], ...] = (
    {**_BYTES, "use_regex": True},  # GPT-2, and the built-in bases
    {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False},
            {**_BYTES, "use_regex": False},
        ],
    },
)


def splits_at_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether a text without added tokens has as many tokens as its words, each with the space before it."""
    model, splitter = tokenizer.model, tokenizer.pre_tokenizer
    if not isinstance(model, models.BPE) or model.dropout or tokenizer.normalizer or splitter is None:
        return False
    how = json.loads(splitter.__getstate__())
    for part in (how, *how.get("pretokenizers", ())):
        part.pop("trim_offsets", None)  # changes no token
    return how in SPLIT_AT_SPACES


class WordCounts:
    """Counts the tokens of texts for a tokenizer that `splits_at_spaces`. Several threads may use it."""

    def __init__(self, tokenizer: Tokenizer, count: Callable[[Sequence[str]], list[int]]) -> None:
        """`count` returns the numbers of tokens of texts that are tokenized as a whole."""
        self._count = count
        added = [re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()]
        self._find_added = re.compile("|".join(added) or "(?!)").search
        self._known: dict[str, int] = {}

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text."""
        words = [self._words_of(text) for text in texts]
        known = self._count_words({word for of_text in words for word in of_text})
        whole = iter(self._count([text for text, of_text in zip(texts, words, strict=True) if not of_text]))
        return [sum(map(known.__getitem__, of_text)) if of_text else next(whole) for of_text in words]

    def _words_of(self, text: str) -> list[str]:
        """Return the words of a text, each with the space before it; none if it is not made of such words alone."""
        words = _WORD.findall(text)
        if not words or sum(map(len, words)) < len(text) or max(map(len, words)) > LONGEST_WORD:
            return []
        return [] if self._find_added(text) else words

    def _count_words(self, words: set[str]) -> dict[str, int]:
        """Return the number of tokens of these words at least."""
        known = self._known
        new = [*words.difference(known)]
        if len(known) + len(new) > MAX_WORDS:
            self._known = known = {}  # another thread may still read the former ones
            new = [*words]
        known.update(zip(new, self._count(new), strict=True))
        return known
