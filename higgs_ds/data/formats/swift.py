"""The `swift` format: conversations for ms-swift, as JSON Lines or a JSON array.

{"messages": [{"role": "user", "content": "Say this."}, {"role": "assistant", "content": "<audio>Good morning."}],
 "audios": ["a.wav"], "system": "Generate audio following instruction."}

Each `<audio>` tag stands for the next file in `audios`.

An assistant turn with audio and words becomes the audio alone, because training on both would teach the model to write
the words first. The words are the text to speak and go into the preceding user turn: if that turn does not contain
them already, they replace its text (an instruction such as "Say this."), and its audio stays in front of them as a
reference. If there is no preceding user turn, one is added. A sample without a prompt is a plain recording and gets the
system message of a plain recording.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from higgs_ds.data.formats.chatml import speaker_and_language
from higgs_ds.data.formats.checks import Reading, check_keys, kind_of, path_of, read_items, text_of
from higgs_ds.data.formats.jsonio import json_items
from higgs_ds.data.formats.turns import object_of, role_of
from higgs_ds.data.templates import Recording, system_message
from higgs_ds.model.sample import ASSISTANT, ROLES, SYSTEM, USER, AudioClip, Message, PendingEntry, Sample
from higgs_ds.options.train import DataOptions

TAG = "<audio>"
SAMPLE_KEYS = ("messages", "audios", "audio", "system", "speaker", "language", "misc")
MESSAGE_KEYS = ("role", "content", "loss")


class _Turn(NamedTuple):
    role: str
    pieces: list[str]  # the text split at the tags: one piece more than there are tags

    @property
    def num_tags(self) -> int:
        return len(self.pieces) - 1

    @property
    def words(self) -> str:
        return " ".join(piece.strip() for piece in self.pieces if piece.strip())

    @property
    def is_spoken(self) -> bool:
        """Whether the turn is speech together with its words."""
        return self.role == ASSISTANT and self.num_tags > 0 and bool(self.words)


def read(path: Path, options: DataOptions) -> Iterator[PendingEntry]:
    """Yield the entries of an ms-swift file."""
    return read_items(path, json_items(path), options, build)


def build(raw: Any, reading: Reading) -> Sample | None:
    """Build one sample from its JSON value."""
    entry = object_of(raw, reading)
    if entry is None:
        return None
    check_keys(entry, SAMPLE_KEYS, "", reading)
    if entry.get("start_index") is not None:
        reading.report(
            "start_index",
            "is not part of the swift format, which trains on every assistant turn; use the chatml format",
        )
    turns = _turns(entry, reading)
    clips = _clips(entry, reading)
    speaker, language = speaker_and_language(entry, reading)
    if reading.faults:
        return None
    clips_of_turns = _clips_of_turns(turns, clips, reading)
    if reading.faults:
        return None
    messages = _messages(turns, clips_of_turns)
    if messages[0].role == ASSISTANT and messages[0].clips:
        reading.report(
            "messages[0]",
            f"is speech without its transcript; write the transcript after {TAG}, or in a user turn before it",
        )
    return Sample(messages, 0, speaker, reading.source, language)


def _turns(entry: dict[str, Any], reading: Reading) -> list[_Turn]:
    raw = entry.get("messages")
    if not isinstance(raw, list) or not raw:
        reading.report("messages", f"must be a list of one or more messages, but is {kind_of(raw)}")
        return []
    turns = [_turn(message, f"messages[{i}]", reading) for i, message in enumerate(raw)]
    if entry.get("system") is not None:
        if turns[0].role == SYSTEM:
            reading.report("system", "is given in addition to a system message in 'messages'; remove one of them")
        turns.insert(0, _Turn(SYSTEM, [text_of(entry["system"], "system", reading) or ""]))
    return turns


def _turn(raw: Any, where: str, reading: Reading) -> _Turn:
    if not isinstance(raw, dict):
        reading.report(where, f"must be an object with 'role' and 'content', but is {kind_of(raw)}")
        return _Turn("", [""])
    check_keys(raw, MESSAGE_KEYS, f"{where}.", reading)
    if raw.get("loss") in (False, 0):
        reading.report(
            f"{where}.loss",
            "must not be false: the swift format trains on every assistant turn; use start_index in the chatml format",
        )
    text = text_of(raw.get("content"), f"{where}.content", reading)
    return _Turn(role_of(raw, where, ROLES, reading), (text or "").split(TAG))


def _clips(entry: dict[str, Any], reading: Reading) -> list[AudioClip]:
    given = [key for key in ("audios", "audio") if entry.get(key) is not None]
    if len(given) > 1:
        reading.report("audio", "is given in addition to 'audios'; remove one of them")
    if not given:
        return []
    names = entry[given[0]]
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list):
        reading.report(given[0], f"must be a list of audio files, but is {kind_of(names)}")
        return []
    paths = [path_of(name, f"{given[0]}[{i}]", reading) for i, name in enumerate(names)]
    return [AudioClip(path) for path in paths if path is not None]


def _clips_of_turns(turns: list[_Turn], clips: list[AudioClip], reading: Reading) -> list[list[AudioClip]]:
    """Return the clips of each turn, assigned in the order of the tags."""
    num_tags = sum(turn.num_tags for turn in turns)
    skip_users = False
    if num_tags != len(clips):
        # A user turn may hold the instruction of another task, such as "<audio> /translate". Its tag has no audio file,
        # and its text is dropped too, because the words to speak replace it.
        num_spoken = sum(turn.num_tags for turn in turns if turn.role == ASSISTANT)
        others = [(turn, after) for turn, after in itertools.pairwise(turns) if turn.role != ASSISTANT]
        replaced = all(not turn.num_tags or (turn.role == USER and after.is_spoken) for turn, after in others)
        skip_users = num_spoken == len(clips) > 0 and turns[-1].role == ASSISTANT and replaced
        if not skip_users:
            reading.report("audios", f"has {len(clips)} files for {num_tags} {TAG} tags; give one file for each tag")
    rest = iter(clips)
    counts = [0 if skip_users and turn.role != ASSISTANT else turn.num_tags for turn in turns]
    return [list(itertools.islice(rest, count)) for count in counts]


def _messages(turns: list[_Turn], clips_of_turns: list[list[AudioClip]]) -> tuple[Message, ...]:
    messages: list[Message] = []
    for turn, clips in zip(turns, clips_of_turns, strict=True):
        if not turn.is_spoken:
            messages.append(Message(turn.role, _interleaved(turn.pieces, clips)))
            continue
        before = messages.pop() if messages and messages[-1].role == USER else Message(USER, ())
        has_words = _contains_words(before, turn.words)
        if not has_words and not messages:  # no prompt: a plain recording
            messages.append(system_message(Recording(clips[0], turn.words)))
        messages.append(before if has_words else Message(USER, (*before.clips, turn.words)))
        messages.append(Message(ASSISTANT, tuple(clips)))
    return tuple(messages)


def _interleaved(pieces: list[str], clips: list[AudioClip]) -> tuple[str | AudioClip, ...]:
    parts: list[str | AudioClip] = []
    for i, piece in enumerate(pieces):
        parts += [piece] if piece.strip() else []
        parts += clips[i : i + 1]
    return tuple(parts)


def _contains_words(message: Message, words: str) -> bool:
    """Return whether the text of a message contains the words, ignoring case and white space."""
    texts = (" ".join(part.split()) for part in message.parts if isinstance(part, str))
    return " ".join(words.split()).casefold() in " ".join(texts).casefold()
