"""Reference clips of a sample: leaving them out, and giving it a clip of another sample of its speaker."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from higgs_ds.model.sample import ASSISTANT, SPEAKER_TAG, SYSTEM, USER, Message, Sample

_EMPTY_SCENE = re.compile(r"\s*<\|scene_desc_start\|>\s*<\|scene_desc_end\|>")


@dataclass(frozen=True)
class PlainForm:
    """A sample without its reference: its messages, `start_index` among them, and the numbers of the clips it keeps."""

    messages: tuple[Message, ...]
    start_index: int
    clips: tuple[int, ...]

    def of(self, sample: Sample) -> Sample:
        return replace(sample, messages=self.messages, start_index=self.start_index)


def plain_form(sample: Sample) -> PlainForm | None:
    """Return a sample as `--reference none` makes it, or None if it has no reference.

    References are clips in system turns, with the line that names their voice, and before `start_index` a user turn of
    text with the assistant turns of speech that answer it.
    """
    removed = _reference_turns(sample)
    if not removed and not any(message.role == SYSTEM and message.clips for message in sample.messages):
        return None
    messages: list[Message] = []
    kept: list[int] = []
    number, num_removed = 0, 0
    for turn, message in enumerate(sample.messages):
        clips = range(number, number + len(message.clips))
        number = clips.stop
        if turn in removed:
            num_removed += 1
            continue
        if message.role == SYSTEM and message.clips:
            text = _without_clips(message)
            message = replace(message, parts=(text,))
            if not text.strip():
                num_removed += turn < sample.start_index
                continue
        else:
            kept += clips
        messages.append(message)
    if len(kept) == number:
        return None
    if sample.plain_system is not None and messages[0].role == SYSTEM:
        messages[0] = sample.plain_system
    elif sample.plain_system is not None:
        messages.insert(0, sample.plain_system)
        num_removed -= 1
    return PlainForm(tuple(messages), max(0, sample.start_index - num_removed), tuple(kept))


def _reference_turns(sample: Sample) -> set[int]:
    """Return the turns that are references: a user turn of text, and after it assistant turns that only speak."""
    found: set[int] = set()
    messages = sample.messages
    for turn, message in enumerate(messages[: sample.start_index]):
        if message.role != USER or message.clips:
            continue
        end = turn + 1
        while end < len(messages) and messages[end].role == ASSISTANT:
            end += 1
        answers = messages[turn + 1 : end]
        if answers and end <= sample.start_index and all(len(m.clips) == len(m.parts) > 0 for m in answers):
            found.update(range(turn, end))
    return found


def _without_clips(message: Message) -> str:
    """Return the text of a system message without the lines that have a clip (`SPEAKER0: ` and the clip)."""
    text = ""
    for part in message.parts:
        text = text + part if isinstance(part, str) else text[: text.rfind("\n") + 1].rstrip("\n")
    return _EMPTY_SCENE.sub("", text)


@dataclass(frozen=True)
class Candidate:
    """The target of a sample as a reference for another: a clip, and the text that it speaks.

    Numbers of 8 bytes stand for the words, for the content of the clip and for its file: equal ones are the same.
    """

    num_tokens: int  # that it adds to the other sample
    words: int
    clip: int
    file: int
    start_s: float  # of the clip in its file
    end_s: float
    takes: bool  # whether the sample itself can get a reference: it has none, and no other turns


def pair_of(sample: Sample) -> tuple[Message, Message] | None:
    """Return the turns with a sample's text and its speech, or None if these are not all that it trains.

    Texts with a speaker's tag are of several speakers, and are not taken.
    """
    messages = sample.messages
    if len(messages) < 2 or [t for t in range(len(messages)) if sample.is_target(t)] != [len(messages) - 1]:
        return None
    text, speech = messages[-2:]
    is_spoken = text.role == USER and not text.clips and len(speech.parts) == len(speech.clips) == 1
    if not is_spoken or speech.recipient or SPEAKER_TAG.search(_words(text)):
        return None
    return text, speech


def candidate_of(
    sample: Sample, key: str, num_tokens: int, file: int | None, start_s: float, seconds: float
) -> Candidate:
    """Describe the target of a sample that `pair_of` accepts.

    Args:
        key: of the codes of the target.
        num_tokens: of its pair of turns.
        file: the number of the target's file, None if it has no file of its own.
        start_s: of the target in its file.
    """
    text = _words(sample.messages[-2])
    return Candidate(
        num_tokens=num_tokens,
        words=number_of(" ".join(text.casefold().split())),
        clip=number_of(key),
        file=number_of(key) if file is None else file,
        start_s=start_s,
        end_s=start_s + seconds,
        takes=len(sample.clips) == 1 and all(message.role == SYSTEM for message in sample.messages[:-2]),
    )


def with_reference(sample: Sample, pair: Sequence[Message]) -> Sample:
    """Return a sample with a pair of turns before its own, as `--reference context` places them."""
    messages = (*sample.messages[:-2], *pair, *sample.messages[-2:])
    return replace(sample, messages=messages, start_index=len(messages) - 2)


def _words(message: Message) -> str:
    return " ".join(part for part in message.parts if isinstance(part, str))


@lru_cache(maxsize=4096)  # many clips of one file
def number_of(text: str) -> int:
    """Return 8 bytes that differ for different texts, as a number."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
