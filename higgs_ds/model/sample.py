"""One conversation to train on, as every reader yields it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)
SPEAKER_TAG = re.compile(r"\[SPEAKER\d+\]")  # before the words of one of several speakers


@dataclass(frozen=True)
class AudioClip:
    """A part of an audio file, given by `offset_s` and `duration_s` in seconds; without them, the whole file.

    For audio embedded in a manifest (base64, Parquet), `data` holds the bytes of an audio file, and `path` names the
    manifest and the place in it.
    """

    path: Path
    offset_s: float = 0.0
    duration_s: float | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Message:
    """One turn: text and audio, in order of appearance. `clips` are the audio among its parts."""

    role: str
    parts: tuple[str | AudioClip, ...]
    recipient: str | None = None
    clips: tuple[AudioClip, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Found once: checking a sample asks for its clips a dozen times.
        object.__setattr__(self, "clips", tuple([part for part in self.parts if isinstance(part, AudioClip)]))


@dataclass(frozen=True)
class Sample:
    """A conversation. Assistant turns from `start_index` on are targets; `source` is FILE:LINE, for error messages.

    `text_files` are the files, other than the manifest, that its text was read from. `plain_system` is what its first
    message is without reference clips, if they leave more than their own lines there (a description, for instance).
    """

    messages: tuple[Message, ...]
    start_index: int
    speaker: str | None
    source: str
    language: str | None = None
    text_files: tuple[Path, ...] = ()
    plain_system: Message | None = None

    @property
    def clips(self) -> list[AudioClip]:
        """All clips, in the order of the conversation."""
        return [clip for message in self.messages for clip in message.clips]

    @property
    def is_heard(self) -> list[bool]:
        """For each clip, whether a Whisper tower encodes it: it does so in turns that are not the assistant's."""
        return [message.role != ASSISTANT for message in self.messages for _ in message.clips]

    def is_target(self, turn: int) -> bool:
        """Return whether the message at index `turn` is a target."""
        return turn >= self.start_index and self.messages[turn].role == ASSISTANT

    @property
    def has_target_audio(self) -> bool:
        return any(message.clips for turn, message in enumerate(self.messages) if self.is_target(turn))


@dataclass(frozen=True)
class Entry:
    """A reader's result for one sample of a manifest: the sample, or its faults ("field: reason").

    `left_out`: what of the sample a family's prompt has no place for.
    """

    source: str
    sample: Sample | None
    faults: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


PendingEntry = Callable[[], Entry]  # an entry that is built when it is called: those of other ranks are not
