"""Convert a plain recording (a clip and its transcript) to the conversation format that the base was pretrained on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from higgs_ds.model.sample import ASSISTANT, SYSTEM, USER, AudioClip, Message

INSTRUCTION = "Generate audio following instruction."
# The prompt of the base's own example for several speakers without references, copied word for word.
SPEAKERS_INSTRUCTION = (
    "You are an AI assistant designed to convert text into speech.\n"
    "If the user's message includes a [SPEAKER*] tag, do not read out the tag and generate speech for the following "
    "text, using the specified voice.\n"
    "If no speaker tag is present, select a suitable voice on your own."
)
QUIET_ROOM = "Audio is recorded from a quiet room."
CONTEXT, IN_SYSTEM, NO_REFERENCE = "context", "system", "none"  # the values of --reference, besides random


@dataclass(frozen=True)
class Reference:
    """A voice to speak with: a clip and its transcript, or a description in words. `tag` is, for example, SPEAKER0."""

    clip: AudioClip | None
    words: str | None = None
    tag: str | None = None
    description: str | None = None


@dataclass(frozen=True)
class Recording:
    """A clip, its transcript (`words`), and its metadata. The words of several speakers have [SPEAKERi] tags."""

    clip: AudioClip
    words: str
    speaker: str | None = None
    language: str | None = None
    scene: str | None = QUIET_ROOM
    references: tuple[Reference, ...] = ()


def scene_block(parts: tuple[str | AudioClip, ...]) -> tuple[str | AudioClip, ...]:
    """Wrap a description of the scene as in a system message."""
    return joined(("<|scene_desc_start|>\n", *parts, "\n<|scene_desc_end|>"))


def joined(parts: tuple[str | AudioClip, ...]) -> tuple[str | AudioClip, ...]:
    """Merge adjacent texts, since a token may cross the boundary between them."""
    merged: list[str | AudioClip] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def conversation(recording: Recording, placement: str) -> tuple[tuple[Message, ...], int]:
    """Return the messages of a recording, and the index of the first message of the target pair.

    Args:
        placement: where reference clips go: `context` (a pair of turns each, before the target), `system` (the system
            message) or `none` (omitted). Descriptions in words always go into the system message.

    Raises:
        ValueError: a reference clip has no transcript, and `context` needs it.
    """
    turns = []
    if placement == CONTEXT:
        for tag, ref in _tagged(recording):
            if ref.clip is None:
                continue
            if ref.words is None:
                raise ValueError(f"the reference clip of {tag} has no transcript, which --reference {CONTEXT} needs")
            several = len(recording.references) > 1 and not ref.words.startswith(f"[{tag}]")
            words = f"[{tag}] {ref.words}" if several else ref.words
            turns += [Message(USER, (words,)), Message(ASSISTANT, (ref.clip,))]
    target = (Message(USER, (recording.words,)), Message(ASSISTANT, (recording.clip,)))
    return (system_message(recording, placement), *turns, *target), 1 + len(turns)


def system_message(recording: Recording, placement: str = NO_REFERENCE) -> Message:
    """Return the instruction, the scene and the voices. Other speakers appear only as tags in the words."""
    has_clips = placement != NO_REFERENCE and any(ref.clip is not None for ref in recording.references)
    several = len(set(re.findall(r"\[SPEAKER\d+\]", recording.words))) > 1
    instruction = SPEAKERS_INSTRUCTION if several and not has_clips else INSTRUCTION
    lines = [line for tag, ref in _tagged(recording) for line in _voice_line(tag, ref, placement)]
    if not recording.scene and not lines:
        return Message(SYSTEM, (instruction,))
    scene = [recording.scene] if recording.scene else []
    gap = ["\n\n"] if scene and lines else []
    return Message(SYSTEM, joined((f"{instruction}\n\n", *scene_block((*scene, *gap, *lines[1:])))))


def _voice_line(tag: str, ref: Reference, placement: str) -> tuple[str | AudioClip, ...]:
    """Return a voice's line in the scene. A description is used only if no clip is: a clip conveys more of a voice."""
    if placement == IN_SYSTEM and ref.clip is not None:
        return ("\n", f"{tag}: ", ref.clip)
    if ref.description and (ref.clip is None or placement == NO_REFERENCE):
        return ("\n", f"{tag}: {ref.description}")
    return ()


def _tagged(recording: Recording) -> list[tuple[str, Reference]]:
    return [(ref.tag or f"SPEAKER{i}", ref) for i, ref in enumerate(recording.references)]
