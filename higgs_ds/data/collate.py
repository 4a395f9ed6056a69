"""Collate encoded samples into one micro-batch: padded ids, delayed codes, and the targets with their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from higgs_ds.data.mel_features import MARGIN, MelFeatures
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.prompt import Prompt
from higgs_ds.model.stream import AudioStream


@dataclass(frozen=True)
class EncodedSample:
    """A prompt and the codes (C, F), int64, of each of its clips, in order.

    `heard`: for a model with a Whisper tower, the mel features (bins, T) of each stretch that it encodes, in order.
    """

    prompt: Prompt
    codes: list[torch.Tensor]
    heard: list[MelFeatures] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B rows of T positions, M of text and A of audio; C codebooks. All tensors are int64.

    Positions are numbered through the batch (row * T + column). The model processes all text positions first, then all
    audio positions, so that the inputs of each of its two FFNs are contiguous. A place is an index into this order;
    `positions` and `places` map between the two orders. A target is stored with the place whose output predicts it:
    that of the preceding position. Rows are padded with text on the right, where causal attention keeps it out of all
    predictions, so no attention mask is needed.
    """

    text_ids: torch.Tensor  # (M,)
    codes: torch.Tensor  # (A, C), delayed
    positions: torch.Tensor  # (M + A,): position of each place, text first
    places: torch.Tensor  # (B, T): place of each position
    text_places: torch.Tensor  # (L,): places whose outputs predict text
    text_targets: torch.Tensor  # (L,)
    audio_places: torch.Tensor  # (K,): places whose outputs predict audio
    audio_targets: torch.Tensor  # (K, C), IGNORE_INDEX where a codebook has no target
    predicting_text: torch.Tensor  # (U,): text places whose outputs predict anything
    predicting_audio: torch.Tensor  # (V,): the same of audio, numbered from the first audio place
    predictions: torch.Tensor  # (L + K,): index of each prediction's place among those two
    audio_rows: torch.Tensor  # (B, S): audio places of each sample, numbered from the first one; A for padding
    audio_at: torch.Tensor  # (A,): index of each of them in the flattened audio_rows
    num_samples: int
    num_tokens: int  # positions that are not padding
    # For a model with a Whisper tower. Its outputs, N x T / 4 of them, are numbered through all stretches.
    features: torch.Tensor | None = None  # float32 (N, bins, T)
    feature_lengths: torch.Tensor | None = None  # (N,)
    feature_rows: torch.Tensor | None = None  # (P,): the tower's outputs that belong to clips
    feature_places: torch.Tensor | None = None  # (P,): the text places that they fill

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the tensors by name, as arguments of the model's forward."""
        values = {field_.name: getattr(self, field_.name) for field_ in fields(self)}
        return {name: v.to(device, non_blocking=True) for name, v in values.items() if isinstance(v, torch.Tensor)}

    def pinned(self) -> Batch:
        """Return the same batch in page-locked memory, from which a GPU can copy while it computes."""
        tensors = self.tensors(torch.device("cpu"))
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return replace(self, **pinned)

    def target_counts(self) -> torch.Tensor:
        """Return the number of targets, float64 (1 + C,): text, then each codebook."""
        audio = (self.audio_targets != IGNORE_INDEX).sum(dim=0)
        return torch.cat([torch.tensor([len(self.text_targets)]), audio]).double()


def collate(
    samples: Sequence[EncodedSample], stream: AudioStream, pad_id: int, num_mel_bins: int | None = None
) -> Batch:
    """Collate samples into one batch. Without samples, the batch is one padding token without a target.

    A batch without audio still has a codes tensor, of zero rows: every rank must run every module. Otherwise, when the
    weights are partitioned over the ranks (ZeRO-3), the other ranks wait forever.

    Args:
        num_mel_bins: for a model with a Whisper tower, which needs an input in every batch for the same reason.
    """
    width = max((len(sample.prompt.input_ids) for sample in samples), default=1)
    ids = torch.full((max(len(samples), 1), width), pad_id)
    empty = torch.zeros(0, dtype=torch.long)
    codes, audio_targets = [empty.view(0, 1).expand(0, stream.num_codebooks)], []
    audio_positions, text_sources, text_targets, audio_sources = [empty], [empty], [empty], [empty]
    for i, sample in enumerate(samples):
        start = i * width
        row, labels = torch.tensor(sample.prompt.input_ids), torch.tensor(sample.prompt.labels)
        ids[i, : len(row)] = row
        columns = (labels != IGNORE_INDEX).nonzero()[:, 0]
        text_sources.append(start + columns - 1)
        text_targets.append(labels[columns])

        delayed, delayed_targets = _delay_clips(sample, stream)
        codes.append(delayed)
        columns = torch.tensor(sample.prompt.audio_columns, dtype=torch.long)
        audio_positions.append(start + columns)
        has_target = (delayed_targets != IGNORE_INDEX).any(dim=1)
        audio_sources.append(start + columns[has_target] - 1)
        audio_targets.append(delayed_targets[has_target])
    is_text = torch.ones(ids.numel(), dtype=torch.bool)
    is_text[torch.cat(audio_positions)] = False
    audio_rows, audio_at = _audio_rows([len(positions) for positions in audio_positions[1:]] or [0])
    positions = torch.cat([is_text.nonzero()[:, 0], *audio_positions])
    places = torch.empty_like(positions)
    places[positions] = torch.arange(len(positions))
    text_places, audio_places = places[torch.cat(text_sources)], places[torch.cat(audio_sources)]
    return Batch(
        text_ids=ids.flatten()[is_text],
        codes=torch.cat(codes),
        positions=positions,
        places=places.view_as(ids),
        text_places=text_places,
        text_targets=torch.cat(text_targets),
        audio_places=audio_places,
        audio_targets=torch.cat([codes[0], *audio_targets]),
        **predicting_places(text_places, audio_places, int(is_text.sum())),
        audio_rows=audio_rows,
        audio_at=audio_at,
        num_samples=len(samples),
        num_tokens=sum(len(sample.prompt.input_ids) for sample in samples),
        **(_tower_inputs(samples, width, places, num_mel_bins) if num_mel_bins else {}),
    )


def predicting_places(text_places: torch.Tensor, audio_places: torch.Tensor, num_text: int) -> dict[str, torch.Tensor]:
    """Return `Batch.predicting_text`, `predicting_audio` and `predictions` of a batch with `num_text` text places."""
    predicting, predictions = torch.cat([text_places, audio_places]).unique(return_inverse=True)
    is_text = predicting < num_text
    return {
        "predicting_text": predicting[is_text],
        "predicting_audio": predicting[~is_text] - num_text,
        "predictions": predictions,
    }


def _audio_rows(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `Batch.audio_rows` (at least one column) and `audio_at` for samples with `counts` audio positions."""
    total, width = sum(counts), max([*counts, 1])
    at = torch.cat([i * width + torch.arange(count) for i, count in enumerate(counts)])
    rows = torch.full((len(counts) * width,), total)
    rows[at] = torch.arange(total)
    return rows.view(len(counts), width), at


def _tower_inputs(
    samples: Sequence[EncodedSample], width: int, places: torch.Tensor, num_mel_bins: int
) -> dict[str, torch.Tensor]:
    """Return a Whisper tower's inputs, or a short silence whose output is unused; and the places of its outputs."""
    stretches = [stretch for sample in samples for stretch in sample.heard]
    silence = [] if stretches else [MelFeatures(torch.zeros(num_mel_bins, MARGIN), MARGIN)]
    longest = max(stretch.values.shape[1] for stretch in stretches + silence)
    features = torch.zeros(len(stretches + silence), num_mel_bins, longest)
    for row, stretch in zip(features, stretches, strict=False):
        row[:, : stretch.values.shape[1]] = stretch.values
    rows = [i * (longest // 4) + torch.arange(stretch.num_outputs) for i, stretch in enumerate(stretches)]
    columns = [i * width + c for i, sample in enumerate(samples) for c in sample.prompt.heard_columns]
    return {
        "features": features,
        "feature_lengths": torch.tensor([stretch.length for stretch in stretches + silence]),
        "feature_rows": torch.cat([torch.zeros(0, dtype=torch.long), *rows]),
        "feature_places": places[torch.tensor(columns, dtype=torch.long)],
    }


def _delay_clips(sample: EncodedSample, stream: AudioStream) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input rows (R, C) and labels (R, C) of a sample's clips. Clips that are not targets have no labels."""
    empty = torch.zeros(0, stream.num_codebooks, dtype=torch.long)
    rows, labels = [empty], [empty]
    for codes, is_target in zip(sample.codes, sample.prompt.target_clips, strict=True):
        rows.append(stream.delay(codes))
        clip_labels = stream.labels(codes)
        labels.append(clip_labels if is_target else torch.full_like(clip_labels, IGNORE_INDEX))
    return torch.cat(rows), torch.cat(labels)
