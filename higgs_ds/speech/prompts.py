"""Samples up to a turn that a model is to speak, with the reference for that turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from higgs_ds.data.dataset import Dataset
from higgs_ds.model.sample import Message, Sample

LONGEST, FRAMES_MORE = 2, 25  # generation is cut off at twice the reference's length plus a second


@dataclass(frozen=True)
class Prompt:
    """A sample up to a turn that the model is to speak; codes (C, F) of the clips before the turn, and of the turn."""

    sample: Sample
    turn: int
    given: list[torch.Tensor]
    target: torch.Tensor

    @property
    def before(self) -> list[Message]:
        """The messages before the turn."""
        return list(self.sample.messages[: self.turn])

    @property
    def words(self) -> str:
        """The text of the turn before, which is the text to speak."""
        return " ".join(part for part in self.sample.messages[self.turn - 1].parts if isinstance(part, str))

    @property
    def max_new_tokens(self) -> int:
        return LONGEST * self.target.shape[1] + FRAMES_MORE


def prompts_of(data: Dataset, count: int | None) -> list[Prompt]:
    """Return prompts from the first samples with audio to generate, up to `count`; of several manifests by turns."""
    found: list[Prompt] = []
    for index in data.alternating():
        if len(found) == count:
            break
        sample = data.sample(index)
        turns = [turn for turn, message in enumerate(sample.messages) if sample.is_target(turn) and message.clips]
        if turns:
            codes = data.encoded(index).codes
            before = sum(len(message.clips) for message in sample.messages[: turns[0]])
            found.append(Prompt(sample, turns[0], codes[:before], codes[before]))
    return found
