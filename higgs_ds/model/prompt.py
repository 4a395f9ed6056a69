"""What the prompts of all families share: tokenizers, the segments of a prompt, and the ids and labels of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Protocol

from tokenizers import Tokenizer as TextEncoder

from higgs_ds.model.sample import AudioClip
from higgs_ds.model.word_counts import WordCounts, splits_at_spaces


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used here."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


class BatchTokenizer(Tokenizer, Protocol):
    """A tokenizer that can also count the tokens of many texts at once."""

    @property
    def vocabulary(self) -> Mapping[str, int]: ...

    def count(self, texts: Sequence[str]) -> list[int]: ...


class CachedTokenizer:
    """A tokenizer that caches recent texts: headers and system prompts occur in every sample."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        """Wrap a tokenizer of the `tokenizers` library: transformers' own methods take ten times as long."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._ids = tokenizer.get_vocab()
        self._encode_batch = tokenizer.encode_batch_fast
        self._encode = lru_cache(maxsize=4096)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        has_words = splits_at_spaces(tokenizer)
        self._count = WordCounts(tokenizer, self._count_whole).count if has_words else self._count_whole

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self._encode(text)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text. Other threads run meanwhile, unlike during `encode`."""
        return self._count(texts)

    def _count_whole(self, texts: Sequence[str]) -> list[int]:
        return [len(encoding) for encoding in self._encode_batch(texts, add_special_tokens=False)]

    def convert_tokens_to_ids(self, tokens: str) -> int:
        return self._ids[tokens]

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokens with their ids."""
        return self._ids


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt: text with special tokens, or the place of one clip."""

    text: str
    is_target: bool
    clip: AudioClip | None = None


@dataclass(frozen=True)
class Prompt:
    """Unshifted token ids and labels of one sample, positions of its audio tokens, and which of its clips are targets.

    `heard_columns`: positions of a Whisper tower's outputs. A clip of several stretches counts as several clips.
    """

    input_ids: list[int]
    labels: list[int]
    audio_columns: list[int]
    target_clips: list[bool]
    heard_columns: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """A clip, or the part of one that a Whisper tower encodes at once: its tower outputs and codec frames."""

    num_outputs: int
    num_frames: int


def stretches_of(num_frames: Sequence[int], heard: Sequence[Sequence[Stretch]]) -> list[Sequence[Stretch]]:
    """Return the stretches of each clip. A clip that no tower encodes is one stretch without outputs."""
    return [stretches or [Stretch(0, n)] for n, stretches in zip_longest(num_frames, heard)]
