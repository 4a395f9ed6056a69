"""The delay pattern of the audio stream: codebook k is delayed by k rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from higgs_ds.model.labels import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AudioStream:
    """The shape of the audio stream: the number of codebooks, and the two special codes after their entries."""

    num_codebooks: int
    bos_id: int
    eos_id: int

    def num_rows(self, num_frames: int) -> int:
        """Return the number of rows of a delayed clip: its frames, one BOS, one EOS, and the last codebook's delay."""
        return num_frames + self.num_codebooks + 1


def apply_delay_pattern(codes: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Delay codes (C, F) into input rows (F + C + 1, C): BOS before each codebook's codes, EOS after them."""
    num_codebooks, num_frames = codes.shape
    rows = codes.new_full((stream.num_rows(num_frames), num_codebooks), stream.eos_id)
    for k in range(num_codebooks):
        rows[: k + 1, k] = stream.bos_id
        rows[k + 1 : k + 1 + num_frames, k] = codes[k]
    return rows


def delayed_labels(codes: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Return unshifted labels (F + C + 1, C) of codes (C, F): the codes and one EOS per codebook; the rest is ignored.

    The EOS teaches the model to stop. The padding around it carries no information.
    """
    num_codebooks, num_frames = codes.shape
    labels = codes.new_full((stream.num_rows(num_frames), num_codebooks), IGNORE_INDEX)
    for k in range(num_codebooks):
        labels[k + 1 : k + 1 + num_frames, k] = codes[k]
        labels[k + 1 + num_frames, k] = stream.eos_id
    return labels


def revert_delay_pattern(rows: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Return the codes (C, F) of delayed rows (R, C), which start with the BOS row, up to the first codebook's EOS.

    Rows of a truncated generation have no EOS. Then every frame that has the codes of all codebooks is returned.
    """
    import torch

    num_rows, num_codebooks = rows.shape
    ends = (rows[:, 0] == stream.eos_id).nonzero()
    num_frames = (int(ends[0]) if len(ends) else num_rows) - 1
    num_frames = max(0, min(num_frames, num_rows - num_codebooks))
    return torch.stack([rows[k + 1 : k + 1 + num_frames, k] for k in range(num_codebooks)])
