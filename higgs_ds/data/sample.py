"""One conversation to learn from, as every reader yields it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True)
class AudioClip:
    """A stretch of an audio file; `offset_s` and `duration_s` in seconds, the whole file without them.

    Audio that lies inside a manifest (base64, Parquet) comes along as `data`, the bytes of an audio file; `path` then
    names the manifest and the place in it.
    """

    path: Path
    offset_s: float = 0.0
    duration_s: float | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Message:
    """One turn: text and audio in the order in which they appear."""

    role: str
    parts: tuple[str | AudioClip, ...]
    recipient: str | None = None

    @property
    def clips(self) -> list[AudioClip]:
        return [part for part in self.parts if isinstance(part, AudioClip)]


@dataclass(frozen=True)
class Sample:
    """A conversation. Assistant turns from `start_index` on are learned; `source` is FILE:LINE for messages.

    `text_files` are those that its words were read from, beside the manifest.
    """

    messages: tuple[Message, ...]
    start_index: int
    speaker: str | None
    source: str
    language: str | None = None
    text_files: tuple[Path, ...] = ()

    @property
    def clips(self) -> list[AudioClip]:
        """Every clip, in the order of the conversation."""
        return [clip for message in self.messages for clip in message.clips]

    @property
    def is_heard(self) -> list[bool]:
        """Of every clip, whether a model with a Whisper tower hears it: in a turn that is not the assistant's."""
        return [message.role != ASSISTANT for message in self.messages for _ in message.clips]

    def is_target(self, turn: int) -> bool:
        """Whether the message at index `turn` is learned."""
        return turn >= self.start_index and self.messages[turn].role == ASSISTANT

    @property
    def has_target_audio(self) -> bool:
        return any(message.clips for turn, message in enumerate(self.messages) if self.is_target(turn))


@dataclass(frozen=True)
class Entry:
    """What a reader has made of one sample of a manifest: the sample, or what is wrong with it ("field: reason")."""

    source: str
    sample: Sample | None
    faults: tuple[str, ...] = ()
