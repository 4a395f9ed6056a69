"""The prompt of Higgs Audio v3: the reference and its words, the text, and the clip that speaks it.

There is no chat template: no turns, no roles, no system text. All of a prompt but its clip is without labels.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from higgs_ds.model.family import Spoken
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.prompt import Prompt, Segment, Tokenizer
from higgs_ds.model.sample import ASSISTANT, SPEAKER_TAG, SYSTEM, USER, Message, Sample
from higgs_ds.model.stream import AudioStream

TTS, TEXT, AUDIO = "<|tts|>", "<|text|>", "<|audio|>"
REF_AUDIO, REF_TEXT = "<|ref_audio|>", "<|ref_text|>"
REQUIRED_TOKENS = (TTS, TEXT, AUDIO, REF_AUDIO)  # older checkpoints have no REF_TEXT


LAYOUT_TOKENS = (*REQUIRED_TOKENS, REF_TEXT)
_TOKEN = re.compile(r"<\|[^<>|]+\|>")


def render(messages: Sequence[Message]) -> Iterator[Segment]:
    """Yield the segments of a conversation as `as_spoken` returns it: `USER? ASSISTANT? USER ASSISTANT?`.

    The first two are a reference, its words and its clip. Without the last, the clip is to be generated.
    """
    to_generate = messages[-1].role == USER
    *reference, asked = messages if to_generate else messages[:-1]
    yield Segment(TTS, False)
    for message in reference:
        yield Segment(REF_TEXT if message.role == USER else REF_AUDIO, False)
        yield from (
            Segment(part, False) if isinstance(part, str) else Segment("", False, part) for part in message.parts
        )
    yield Segment(TEXT, False)
    yield Segment(_text_of(asked), False)
    yield Segment(AUDIO, False)
    if not to_generate:
        yield Segment("", True, messages[-1].clips[0])


def tokenize(
    segments: Iterator[Segment], num_frames: Sequence[int], tokenizer: Tokenizer, stream: AudioStream
) -> Prompt:
    """Return token ids, without labels: a clip's rows are predicted from `<|audio|>` on, and nothing else is.

    The positions of a clip have the id of `<|tts|>`, whose embedding is not used.
    """
    filler = tokenizer.convert_tokens_to_ids(TTS)
    lengths = iter(num_frames)
    input_ids: list[int] = []
    audio_columns: list[int] = []
    target_clips = []
    for segment in segments:
        if segment.clip is None:
            input_ids += tokenizer.encode(segment.text, add_special_tokens=False)
            continue
        rows = stream.num_rows(next(lengths))
        audio_columns += range(len(input_ids), len(input_ids) + rows)
        target_clips.append(segment.is_target)
        input_ids += [filler] * rows
    return Prompt(input_ids, [IGNORE_INDEX] * len(input_ids), audio_columns, target_clips)


def as_spoken(sample: Sample, vocabulary: Collection[str]) -> Spoken:
    """Return a sample with only what the prompt has a place for: a reference and its words, the text, its clip."""
    targets = [turn for turn in range(len(sample.messages)) if sample.is_target(turn)]
    if targets != [len(sample.messages) - 1]:
        fault = f"messages: {len(targets)} turns are to be learned; this model learns the last turn, one clip, alone"
        return Spoken(sample, (fault,))
    *before, target = sample.messages
    faults = []
    if len(target.parts) != 1 or not target.clips or target.recipient:
        faults.append(f"messages[{len(before)}]: must be one audio clip and nothing else for this model")
    messages, found, left_out = spoken_messages(before, vocabulary)
    faults += found
    if faults:
        return Spoken(sample, tuple(faults))
    messages.append(target)
    kept = replace(sample, messages=tuple(messages), start_index=len(messages) - 1, plain_system=None)
    return Spoken(kept if kept != sample else sample, (), left_out)


def spoken_messages(
    messages: Sequence[Message], vocabulary: Collection[str]
) -> tuple[list[Message], list[str], tuple[str, ...]]:
    """Return what the prompt has a place for of the messages before a clip, the faults, and what is left out."""
    left_out = []
    faults: list[str] = []
    if not messages or messages[-1].role != USER or not _text_of(messages[-1]).strip():
        return (
            [],
            ["messages: the turn before the clip must be a user's, with the text that it speaks"],
            (),
        )
    if any(message.role == SYSTEM and _text_of(message).strip() for message in messages):
        left_out.append("system text")
    references = [(turn, clip) for turn, message in enumerate(messages) for clip in message.clips]
    if len(references) > 1:
        faults.append(f"messages: {len(references)} reference clips; the prompt of this model has a place for one")
    of_reference = {turn for turn, _ in references}
    words = next((turn - 1 for turn, _ in references if turn and messages[turn].role == ASSISTANT), None)
    if words is not None and messages[words].role == USER:
        of_reference.add(words)
    for turn, message in enumerate(messages[:-1]):
        if message.role != SYSTEM and turn not in of_reference:
            faults.append(f"messages[{turn}]: is neither the text nor a reference; this model has no other turns")
    text = _text_of(messages[-1])
    spoken = []
    if references and not faults:
        reference_text = _text_of(messages[words]).strip() if words in of_reference and words is not None else ""
        if reference_text and REF_TEXT in vocabulary:
            spoken.append(Message(USER, (reference_text,)))
            faults += _token_faults(reference_text, vocabulary)
        elif reference_text:
            left_out.append("words of references, for which this base's tokenizer has no token,")
        spoken.append(Message(ASSISTANT, (references[0][1],)))
    tags = set(SPEAKER_TAG.findall(text))
    if len(tags) > 1:
        faults.append(f"messages: {len(tags)} speakers in one text; this model speaks with one voice per sample")
    elif tags:
        left_out.append("speaker tags")
        text = SPEAKER_TAG.sub("", text).strip()
    faults += _token_faults(text, vocabulary)
    return [*spoken, Message(USER, (text,))], faults, tuple(left_out)


def _token_faults(text: str, vocabulary: Collection[str]) -> list[str]:
    """Return which tokens in a text cannot stay: those of the layout, and those that the tokenizer does not have."""
    found = dict.fromkeys(_TOKEN.findall(text)) if "<|" in text else {}
    return [
        f"messages: the text contains {token}, which the prompt layout adds itself; remove it from the text"
        if token in LAYOUT_TOKENS
        else f"messages: the text contains {token}, which is not a token of this base; correct or remove it"
        for token in found
        if token in LAYOUT_TOKENS or token not in vocabulary
    ]


def _text_of(message: Message) -> str:
    return "".join(part for part in message.parts if isinstance(part, str))
