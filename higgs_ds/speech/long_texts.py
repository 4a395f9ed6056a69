"""Speak a long text in chunks, each after those before it, so that the voice stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from higgs_ds.model.sample import ASSISTANT, USER, AudioClip, Message

Speak = Callable[[list[Message], list[torch.Tensor]], torch.Tensor]


def speak_chunks(
    prompt: Sequence[Message],
    references: Sequence[torch.Tensor],
    chunks: Sequence[str],
    num_context: int,
    speak: Speak,
    max_references: int | None = None,
) -> torch.Tensor:
    """Return the codes (C, F) of all chunks, one after another.

    As in the original runtime (`generation_chunk_buffer_size` in its examples/generation.py): the last chunks, with
    the codes generated for them, are earlier turns of the conversation, after the references.

    Args:
        prompt: the messages for the whole text, which is the last of them.
        references: codes (C, F) of the clips in `prompt`.
        num_context: how many chunks a chunk is spoken after.
        max_references: how many clips the prompt has a place for; those of `prompt` come first.
        speak: returns the codes (C, F) of the turn after messages, given the codes of their clips.
    """
    if max_references is not None:
        num_context = max(0, min(num_context, max_references - len(references)))
    clip = AudioClip(Path())  # stands for what is generated
    turns: list[tuple[str, torch.Tensor]] = []
    for chunk in chunks:
        before = turns[-num_context:] if num_context else []
        messages = list(prompt[:-1])
        for text, _ in before:
            messages += [Message(USER, (text,)), Message(ASSISTANT, (clip,))]
        codes = speak([*messages, Message(USER, (chunk,))], [*references, *(codes for _, codes in before)])
        turns.append((chunk, codes))
    return torch.cat([codes for _, codes in turns], dim=1)
