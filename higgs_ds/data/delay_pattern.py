"""The delay pattern of the audio stream: codebook k runs k rows behind the first one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from higgs_ds.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class AudioStream:
    """The shape of the audio stream: its codebooks and the two codes behind their entries."""

    num_codebooks: int
    bos_id: int
    eos_id: int

    def num_rows(self, num_frames: int) -> int:
        """Rows of a delayed clip: its frames, one BOS, one EOS, and the last codebook's delay."""
        return num_frames + self.num_codebooks + 1


def apply_delay_pattern(codes: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Delay codes (C, F) into input rows (F + C + 1, C): BOS in front of each codebook, EOS behind it."""
    num_codebooks, num_frames = codes.shape
    rows = codes.new_full((stream.num_rows(num_frames), num_codebooks), stream.eos_id)
    for k in range(num_codebooks):
        rows[: k + 1, k] = stream.bos_id
        rows[k + 1 : k + 1 + num_frames, k] = codes[k]
    return rows


def delayed_labels(codes: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Labels (F + C + 1, C), unshifted, of codes (C, F): the codes and one EOS per codebook; the rest is ignored.

    The EOS is what teaches the model to stop; the filling around it says nothing.
    """
    num_codebooks, num_frames = codes.shape
    labels = codes.new_full((stream.num_rows(num_frames), num_codebooks), IGNORE_INDEX)
    for k in range(num_codebooks):
        labels[k + 1 : k + 1 + num_frames, k] = codes[k]
        labels[k + 1 + num_frames, k] = stream.eos_id
    return labels


def revert_delay_pattern(rows: torch.Tensor, stream: AudioStream) -> torch.Tensor:
    """Codes (C, F) of delayed rows (R, C) that begin with the row of BOS, up to the first codebook's EOS.

    Rows of a generation cut short have no EOS: then every frame whose codebooks are all there is returned.
    """
    num_rows, num_codebooks = rows.shape
    ends = (rows[:, 0] == stream.eos_id).nonzero()
    num_frames = (int(ends[0]) if len(ends) else num_rows) - 1
    num_frames = max(0, min(num_frames, num_rows - num_codebooks))
    return torch.stack([rows[k + 1 : k + 1 + num_frames, k] for k in range(num_codebooks)])
