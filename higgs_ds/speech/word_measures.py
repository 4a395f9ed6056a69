"""What was said against what was heard: word and character errors, missing and repeated words, aligned by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class WordErrors:
    """Counts of one text. `word_errors`: the fewest wrong, missing and added words that explain what was heard.

    `missing`: words of the text without a counterpart. `repeated`: added words that say again what is beside them.
    Characters are counted without spaces, so that a language that has none is treated alike.
    """

    words: int
    word_errors: int
    missing: int
    repeated: int
    characters: int
    character_errors: int

    @classmethod
    def of(cls, said: Sequence[str], heard: Sequence[str]) -> WordErrors:
        """Compare two lists of words."""
        import jiwer

        letters = "".join(said)
        if not said:
            return cls(0, len(heard), 0, 0, 0, len("".join(heard)))
        found = jiwer.process_words(" ".join(said), " ".join(heard))
        in_letters = jiwer.process_characters(letters, "".join(heard))
        repeated = sum(
            _repeated(list(heard), chunk.hyp_start_idx, chunk.hyp_end_idx)
            for chunk in found.alignments[0]
            if chunk.type == "insert"
        )
        return cls(
            len(said), found.substitutions + found.deletions + found.insertions, found.deletions, repeated,
            len(letters), in_letters.substitutions + in_letters.deletions + in_letters.insertions,
        )  # fmt: skip


def _repeated(heard: list[str], start: int, end: int) -> int:
    """Return how many of the added words `start` to `end` - 1 say again the words before or after them."""
    size, added = end - start, heard[start:end]
    before, after = heard[max(0, start - size) : start], heard[end : end + size]
    if added in (before, after):
        return size
    return sum(word in (*before[-1:], *after[:1]) for word in added)
