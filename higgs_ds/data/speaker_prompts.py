"""What a prompt says about who speaks, and --speaker_prompt, which adds it to the system message (`SPEAKER0: ...`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from higgs_ds.data.references import SPEAKER_TAG, number_of, plain_form
from higgs_ds.data.templates import INSTRUCTION
from higgs_ds.model.sample import SYSTEM, USER, Entry, Message, Sample
from higgs_ds.options import fields
from higgs_ds.options.speakers import OPTION, read_descriptions
from higgs_ds.options.train import DataOptions

_SCENE_START, _SCENE_END = "<|scene_desc_start|>", "\n<|scene_desc_end|>"
_VOICE_LINE = re.compile(r"^SPEAKER\d+: *(\S.*)$", re.MULTILINE)
_BRACKETED = re.compile(r"\s*[\[(<{][^\])>}\n]{1,60}[\])>}]")


class SpeakerPrompts:
    """Adds to a sample's system message who speaks: a speaker's name or description, as `conversation` places it."""

    def __init__(self, options: DataOptions) -> None:
        """Raises InputError if the file of descriptions cannot be used."""
        self._kind, self._file = options.speaker_prompt, options.speaker_descriptions
        self._descriptions = read_descriptions(self._file) if self._file else {}

    def apply(self, entry: Entry) -> Entry:
        """Return the entry with the speaker's line in its sample, or with the fault that there is none.

        A sample with a reference gets the line in its form without it. Unchanged are samples without a speaker or
        speech, those that describe a voice already, and those whose words are of several speakers.
        """
        sample = entry.sample
        if self._kind not in (fields.SPEAKER_TAG, fields.SPEAKER_DESCRIPTION) or sample is None:
            return entry
        plain = plain_form(sample)
        messages = plain.messages if plain else sample.messages
        tags = {tag for text in _texts(messages, USER) for tag in SPEAKER_TAG.findall(text)}
        is_described = any(_VOICE_LINE.search(text) for text in _texts(messages, SYSTEM))
        if sample.speaker is None or not sample.has_target_audio or is_described or len(tags) > 1:
            return entry
        voice, fault = self._voice_of(sample.speaker)
        if fault:
            return Entry(entry.source, None, (*entry.faults, f"speaker: {fault}"))
        tag = tags.pop().strip("[]") if tags else "SPEAKER0"
        has_system = messages[0].role == SYSTEM
        system = with_voice(messages[0] if has_system else Message(SYSTEM, (INSTRUCTION,)), f"{tag}: {voice}")
        if plain is not None:
            return replace(entry, sample=replace(sample, plain_system=system))
        messages = (system, *messages[has_system:])
        start_index = sample.start_index + (not has_system)
        return replace(entry, sample=replace(sample, messages=messages, start_index=start_index))

    def _voice_of(self, speaker: str) -> tuple[str, str]:
        """Return what the line says about a speaker, and why there is no line."""
        if self._kind == fields.SPEAKER_TAG:
            fault = f"{speaker!r} contains <|, which begins a token of the prompt layout; rename the speaker"
            return " ".join(speaker.split()), fault if "<|" in speaker else ""
        voice = self._descriptions.get(speaker.strip(), "")
        where = f"add it to {OPTION} {self._file}" if self._file else f"give a file with one as {OPTION}"
        return voice, "" if voice else f"{speaker!r} has no description; {where}"


def with_voice(system: Message, line: str) -> Message:
    """Return a system message of text with a voice's line in its scene, which is added if there is none."""
    text = "".join(part for part in system.parts if isinstance(part, str))
    if _SCENE_END not in text:
        return replace(system, parts=(f"{text}\n\n{_SCENE_START}\n{line}{_SCENE_END}",))
    before, _, after = text.rpartition(_SCENE_END)
    before = before.rstrip()
    gap = "\n" if before.endswith(_SCENE_START) else "\n\n"
    return replace(system, parts=(f"{before}{gap}{line}{_SCENE_END}{after}",))


def voice_in(sample: Sample) -> str | None:
    """Return how the system message of a sample describes its only voice, or None if it does not."""
    found = [voice for text in _texts(sample.messages, SYSTEM) for voice in _VOICE_LINE.findall(text)]
    return found[0].strip() if len(found) == 1 else None


def prompt_number(sample: Sample, keys: Sequence[str]) -> int:
    """Return a number that is the same for samples whose first target has the same prompt, except for its words.

    Of the words, only what may name a voice counts: a tag in brackets, or the speaker's name, at their beginning.

    Args:
        keys: of the codes of the sample's clips.
    """
    clips = iter(keys)
    found: list[tuple[str, ...]] = []
    for turn, message in enumerate(sample.messages):
        if sample.is_target(turn):
            break
        is_spoken = turn + 1 < len(sample.messages) and sample.is_target(turn + 1)
        texts = [part if isinstance(part, str) else next(clips) for part in message.parts]
        if is_spoken and not message.clips:
            texts = [_name_in(text, sample.speaker) for text in texts[:1]]
        found.append((message.role, *texts))
    return _number_of_prompt(tuple(found))


@lru_cache(maxsize=1024)  # many samples have the same prompt but for its words
def _number_of_prompt(prompt: tuple[tuple[str, ...], ...]) -> int:
    return number_of(repr([(role, texts) for role, *texts in prompt]))


def _name_in(words: str, speaker: str | None) -> str:
    """Return the beginning of the words if it may name who speaks them."""
    if speaker and words.lstrip().casefold().startswith(speaker.casefold()):
        after = words.lstrip()[len(speaker) :].lstrip()
        if after.startswith((":", "|", ">", "]")):
            return speaker
    tag = _BRACKETED.match(words)
    return tag[0] if tag else ""


def _texts(messages: Sequence[Message], role: str) -> list[str]:
    return ["".join(part for part in m.parts if isinstance(part, str)) for m in messages if m.role == role]
