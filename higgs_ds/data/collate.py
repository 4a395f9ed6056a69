"""From encoded samples to one micro-batch: padded ids, delayed codes, and where which target stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from higgs_ds.data.delay_pattern import IGNORE_INDEX, AudioStream, apply_delay_pattern, delayed_labels
from higgs_ds.data.prompt import Prompt


@dataclass(frozen=True)
class EncodedSample:
    """A prompt and the codes (C, F), int64, of each of its clips, in order."""

    prompt: Prompt
    codes: list[torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of T positions with R rows of audio codes; C codebooks. All int64 but the mask.

    Targets stand with the flat position (row * T + column) whose output predicts them: the one before their own.
    Rows are padded on the right, where causal attention keeps the padding out of everything that is predicted; no
    attention mask is needed.
    """

    input_ids: torch.Tensor  # (B, T)
    audio_input_ids: torch.Tensor  # (B, R, C)
    audio_input_ids_mask: torch.Tensor  # (B, R), bool: False where a row of codes is padding
    text_positions: torch.Tensor  # (M,)
    text_targets: torch.Tensor  # (M,)
    audio_positions: torch.Tensor  # (K,)
    audio_targets: torch.Tensor  # (K, C), IGNORE_INDEX where a codebook has no target
    num_samples: int
    num_tokens: int  # positions that are not padding

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors by name, as the model's forward takes them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.to(device, non_blocking=True) for name, v in values.items() if isinstance(v, torch.Tensor)}

    def target_counts(self) -> torch.Tensor:
        """Number of targets, float64 (1 + C,): text, then each codebook."""
        audio = (self.audio_targets != IGNORE_INDEX).sum(dim=0)
        return torch.cat([torch.tensor([len(self.text_targets)]), audio]).double()


def collate(samples: Sequence[EncodedSample], stream: AudioStream, pad_id: int) -> Batch:
    """Put samples into one batch. None at all give a batch of one padding token that holds no target.

    A batch without audio still carries codes, in no rows: every rank must run through every module, or a model whose
    weights are spread over the ranks (ZeRO-3) waits for a rank that does not come.
    """
    width = max((len(sample.prompt.input_ids) for sample in samples), default=1)
    input_ids = torch.full((max(len(samples), 1), width), pad_id)
    rows: list[torch.Tensor] = []
    text_positions, text_targets, audio_positions, audio_targets = [], [], [], []
    for i, sample in enumerate(samples):
        ids, labels = torch.tensor(sample.prompt.input_ids), torch.tensor(sample.prompt.labels)
        input_ids[i, : len(ids)] = ids
        columns = (labels != IGNORE_INDEX).nonzero()[:, 0]
        text_positions.append(i * width + columns - 1)
        text_targets.append(labels[columns])

        delayed, row_labels = _delayed(sample, stream)
        rows.append(delayed)
        columns = torch.tensor(sample.prompt.audio_columns, dtype=torch.long)
        has_target = (row_labels != IGNORE_INDEX).any(dim=1)
        audio_positions.append(i * width + columns[has_target] - 1)
        audio_targets.append(row_labels[has_target])
    num_rows = max((len(delayed) for delayed in rows), default=0)
    audio_input_ids = torch.full((len(input_ids), num_rows, stream.num_codebooks), stream.eos_id)
    mask = torch.zeros(len(input_ids), num_rows, dtype=torch.bool)
    for i, delayed in enumerate(rows):
        audio_input_ids[i, : len(delayed)] = delayed
        mask[i, : len(delayed)] = True
    nothing = torch.zeros(0, dtype=torch.long)
    return Batch(
        input_ids=input_ids,
        audio_input_ids=audio_input_ids,
        audio_input_ids_mask=mask,
        text_positions=torch.cat([nothing, *text_positions]),
        text_targets=torch.cat([nothing, *text_targets]),
        audio_positions=torch.cat([nothing, *audio_positions]),
        audio_targets=torch.cat([nothing.view(0, 1).expand(0, stream.num_codebooks), *audio_targets]),
        num_samples=len(samples),
        num_tokens=sum(len(sample.prompt.input_ids) for sample in samples),
    )


def _delayed(sample: EncodedSample, stream: AudioStream) -> tuple[torch.Tensor, torch.Tensor]:
    """Input rows (R, C) and labels (R, C) of all clips of a sample; clips that are not learned have no labels."""
    nothing = torch.zeros(0, stream.num_codebooks, dtype=torch.long)
    rows, labels = [nothing], [nothing]
    for codes, is_target in zip(sample.codes, sample.prompt.target_clips, strict=True):
        rows.append(apply_delay_pattern(codes, stream))
        clip_labels = delayed_labels(codes, stream)
        labels.append(clip_labels if is_target else torch.full_like(clip_labels, IGNORE_INDEX))
    return torch.cat(rows), torch.cat(labels)
