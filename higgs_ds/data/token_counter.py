"""Count the tokens of many samples, without their ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from higgs_ds.data.coder import Coder
from higgs_ds.data.index_writer import CheckedClip
from higgs_ds.model.prompt import stretches_of
from higgs_ds.model.sample import AudioClip, Message


class TokenCounter:
    """Counts the tokens that `prompt_of` gives.

    Texts are tokenized in batches. What surrounds them is counted once for each form of a conversation.
    """

    def __init__(self, coder: Coder) -> None:
        self._tokenizer, self._stream, self._hearing = coder.tokenizer, coder.stream, coder.hearing
        self._render = coder.family.render
        self._count_layout = lru_cache(maxsize=1024)(self._layout)

    def count_texts(self, conversations: Iterable[Sequence[Message]]) -> dict[str, int]:
        """Return the number of tokens of every text in conversations."""
        parts = [part for messages in conversations for message in messages for part in message.parts]
        texts = list(dict.fromkeys(part for part in parts if isinstance(part, str)))
        return dict(zip(texts, self._tokenizer.count(texts), strict=True))

    def count(
        self, messages: Sequence[Message], clips: Sequence[CheckedClip], tokens_of_texts: Mapping[str, int]
    ) -> int:
        """Return the number of tokens of a conversation, given its clips and what `count_texts` returned."""
        form = tuple([(m.role, m.recipient, *[isinstance(part, str) for part in m.parts]) for m in messages])
        texts = [tokens_of_texts[part] for m in messages for part in m.parts if isinstance(part, str)]
        return self._count_layout(form) + sum(texts) + self._count_audio(clips)

    def _count_audio(self, clips: Sequence[CheckedClip]) -> int:
        num_rows = self._stream.num_rows
        if self._hearing is None:
            return sum([num_rows(clip.num_frames) for clip in clips])
        heard = [self._hearing.stretches(clip.num_frames, clip.num_outputs) for clip in clips]
        stretches = stretches_of([clip.num_frames for clip in clips], heard)
        between = sum(2 * (len(pieces) - 1) for pieces in stretches)  # two tokens between stretches
        return between + sum(piece.num_outputs + num_rows(piece.num_frames) for pieces in stretches for piece in pieces)

    def _layout(self, form: tuple[tuple[Any, ...], ...]) -> int:
        """Count the tokens around texts and clips, given each message's role, recipient, and which parts are texts."""
        clip = AudioClip(Path())
        messages = [Message(role, tuple("" if t else clip for t in texts), to) for role, to, *texts in form]
        around = [segment.text for segment in self._render(messages, 0) if segment.clip is None and segment.text]
        return sum(len(self._tokenizer.encode(text, add_special_tokens=False)) for text in around)
