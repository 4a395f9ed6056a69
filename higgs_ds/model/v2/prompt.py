"""The prompt of Higgs Audio v2: a conversation to token ids and text labels, in the layout of its pretraining."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.prompt import Prompt, Segment, Stretch, Tokenizer, stretches_of
from higgs_ds.model.sample import ASSISTANT, Message
from higgs_ds.model.stream import AudioStream

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


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(messages: Sequence[Message], start_index: int) -> Iterator[Segment]:
    """Yield the segments of a conversation. Each is tokenized separately, as in the original runtime.

    A clip's segment is `<|AUDIO_OUT|>` in an assistant turn and `<|AUDIO|>` in any other. The model processes the codes
    in the same way in both cases, so `tokenize` inserts the same placeholders for both.
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
    """Yield the segments of a conversation that ends where the model starts to generate speech."""
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
    """Return token ids and labels. A clip of F frames takes F + 2 audio tokens and C - 1 delay tokens, without labels.

    A Whisper tower's outputs for a clip precede its audio tokens. A clip of several stretches becomes as many clips, as
    in the original runtime; here each of them has its own codes.

    Args:
        num_frames: length of each clip in codec frames, in order.
        heard: for a model with a Whisper tower, the stretches of each clip; empty for a clip it does not encode.
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


def missing_tokens(vocabulary: dict[str, int]) -> list[str]:
    """Return the special tokens of the layout that are missing from a tokenizer's vocabulary."""
    return [token for token in REQUIRED_TOKENS if token not in vocabulary]
