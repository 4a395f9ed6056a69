"""From a sample to token ids and text labels, in the layout that the model was pretrained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Protocol

from higgs_ds.data.delay_pattern import AudioStream
from higgs_ds.data.sample import ASSISTANT, AudioClip, Message, Sample
from higgs_ds.model.loss import IGNORE_INDEX

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TURN, END_OF_MESSAGE = "<|eot_id|>", "<|eom_id|>"
AUDIO_EOS = "<|audio_eos|>"
AUDIO_IN_BOS, AUDIO_IN = "<|audio_bos|>", "<|AUDIO|>"
AUDIO_OUT_BOS, AUDIO_OUT = "<|audio_out_bos|>", "<|AUDIO_OUT|>"
AUDIO_DELAY = "<|reserved_special_token_6|>"
REQUIRED_TOKENS = (
    BEGIN_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", END_OF_TURN, END_OF_MESSAGE,
    AUDIO_IN_BOS, AUDIO_IN, AUDIO_EOS, AUDIO_OUT_BOS, AUDIO_OUT, AUDIO_DELAY,
)  # fmt: skip


class Tokenizer(Protocol):
    """What is needed of a tokenizer of transformers."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str) -> int: ...


class CachedTokenizer:
    """A tokenizer that remembers short texts: headers and system prompts come with every sample."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes a fast tokenizer of transformers, and asks what is under it: that takes a tenth of the time."""
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.convert_tokens_to_ids = tokenizer.convert_tokens_to_ids
        self._encode = lru_cache(maxsize=4096)(lambda text: backend.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self._encode(text)


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt: text with special tokens, or the place of one clip."""

    text: str
    is_target: bool
    clip: AudioClip | None = None


@dataclass(frozen=True)
class Prompt:
    """Token ids and labels of one sample, unshifted; where its audio tokens stand; which of its clips are learned.

    `heard_columns`: where a Whisper tower's outputs stand. A clip that it hears in several stretches counts as several.
    """

    input_ids: list[int]
    labels: list[int]
    audio_columns: list[int]
    target_clips: list[bool]
    heard_columns: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """A clip, or a stretch of one: how many outputs a Whisper tower has for it, and its length in codec frames."""

    num_outputs: int
    num_frames: int


def stretches_of(num_frames: Sequence[int], heard: Sequence[Sequence[Stretch]]) -> list[Sequence[Stretch]]:
    """The stretches of each clip; one that no tower hears, and all of them where there is none, is in one piece."""
    return [stretches or [Stretch(0, n)] for n, stretches in zip_longest(num_frames, heard)]


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(messages: Sequence[Message], start_index: int) -> Iterator[Segment]:
    """The segments of a conversation, each tokenized on its own, as the original runtime does.

    A clip's segment holds `<|AUDIO_OUT|>` in an assistant turn and `<|AUDIO|>` in another. The model gives codes the
    same path through its layers in both cases, so that `tokenize` puts the same placeholders in for either.
    """
    for turn, message in enumerate(messages):
        is_assistant = message.role == ASSISTANT
        is_target = is_assistant and turn >= start_index
        yield Segment((BEGIN_OF_TEXT if turn == 0 else "") + header(message.role), False)
        if message.recipient:
            yield Segment(f"{message.recipient}<|recipient|>", is_target)
        for part in message.parts:
            if isinstance(part, str):
                yield Segment(part, is_target)
            else:
                yield Segment(AUDIO_OUT_BOS if is_assistant else AUDIO_IN_BOS, is_target)
                yield Segment(AUDIO_OUT if is_assistant else AUDIO_IN, is_target, part)
                yield Segment(AUDIO_EOS, is_target)
        followed = turn + 1 < len(messages) and messages[turn + 1].role == ASSISTANT
        yield Segment(END_OF_MESSAGE if is_assistant and followed else END_OF_TURN, is_target)


def render_generation(messages: Sequence[Message]) -> Iterator[Segment]:
    """The segments of a conversation that ends where the model begins to speak."""
    yield from render(messages, len(messages))
    yield Segment(header(ASSISTANT), False)
    yield Segment(AUDIO_OUT_BOS, False)


def tokenize(
    segments: Iterator[Segment],
    num_frames: Sequence[int],
    tokenizer: Tokenizer,
    stream: AudioStream,
    heard: Sequence[Sequence[Stretch]] = (),
) -> Prompt:
    """Token ids and labels; a clip of F frames takes F + 2 audio tokens and C - 1 delay tokens, all without a label.

    What a Whisper tower makes of a clip stands in front of it. A clip of several stretches becomes as many clips, as in
    the original runtime; each has its own codes here.

    Args:
        num_frames: length of each clip, in order, in codec frames.
        heard: for a model with a tower, the stretches of each clip; none for a clip that it does not hear.
    """
    audio_in_id, *between = (tokenizer.convert_tokens_to_ids(t) for t in (AUDIO_IN, AUDIO_EOS, AUDIO_IN_BOS))
    audio_id = tokenizer.convert_tokens_to_ids(AUDIO_OUT)
    delay_id = tokenizer.convert_tokens_to_ids(AUDIO_DELAY)
    clips = iter(stretches_of(num_frames, heard))
    input_ids: list[int] = []
    labels: list[int] = []
    audio_columns: list[int] = []
    heard_columns: list[int] = []
    target_clips = []
    for segment in segments:
        if segment.clip is not None:
            ids = []
            for number, stretch in enumerate(next(clips)):
                ids += between if number else []
                at = len(input_ids) + len(ids)
                heard_columns += range(at, at + stretch.num_outputs)
                at += stretch.num_outputs
                audio_columns += range(at, at + stream.num_rows(stretch.num_frames))
                target_clips.append(segment.is_target)
                ids += [audio_in_id] * stretch.num_outputs + [audio_id] * (stretch.num_frames + 2)
                ids += [delay_id] * (stream.num_codebooks - 1)
        else:
            ids = tokenizer.encode(segment.text, add_special_tokens=False)
        has_labels = segment.is_target and segment.clip is None
        input_ids += ids
        labels += ids if has_labels else [IGNORE_INDEX] * len(ids)
    return Prompt(input_ids, labels, audio_columns, target_clips, heard_columns)


def prompt_of(
    sample: Sample,
    num_frames: Sequence[int],
    tokenizer: Tokenizer,
    stream: AudioStream,
    heard: Sequence[Sequence[Stretch]] = (),
) -> Prompt:
    """Token ids and labels of a sample to learn from; arguments as of `tokenize`."""
    return tokenize(render(sample.messages, sample.start_index), num_frames, tokenizer, stream, heard)


def count_tokens(
    sample: Sample,
    num_frames: Sequence[int],
    tokenizer: Tokenizer,
    stream: AudioStream,
    heard: Sequence[Sequence[Stretch]] = (),
) -> int:
    """How many tokens `prompt_of` gives."""
    texts = (s.text for s in render(sample.messages, sample.start_index) if s.clip is None)
    num_text = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    clips = stretches_of(num_frames, heard)
    num_audio = sum(piece.num_outputs + stream.num_rows(piece.num_frames) for pieces in clips for piece in pieces)
    return num_text + num_audio + sum(2 * (len(pieces) - 1) for pieces in clips)  # two tokens between stretches


def missing_tokens(vocabulary: dict[str, int]) -> list[str]:
    """Special tokens of the layout that a tokenizer's vocabulary lacks."""
    return [token for token in REQUIRED_TOKENS if token not in vocabulary]
