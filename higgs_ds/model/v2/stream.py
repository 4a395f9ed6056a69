"""The audio stream of Higgs Audio v2: a row of BOS, the delayed codes, and EOS after each codebook's codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.stream import AudioStream

if TYPE_CHECKING:
    import torch


class FramedStream(AudioStream):
    """A stream whose clips start with a row of BOS and end with a row of EOS."""

    def num_rows(self, num_frames: int) -> int:
        """Return the number of rows of a delayed clip: its frames, one BOS, one EOS, and the last codebook's delay."""
        return num_frames + self.num_codebooks + 1

    def delay(self, codes: torch.Tensor) -> torch.Tensor:
        """Delay codes (C, F) into input rows (F + C + 1, C): BOS before each codebook's codes, EOS after them."""
        num_codebooks, num_frames = codes.shape
        rows = codes.new_full((self.num_rows(num_frames), num_codebooks), self.eos_id)
        for k in range(num_codebooks):
            rows[: k + 1, k] = self.bos_id
            rows[k + 1 : k + 1 + num_frames, k] = codes[k]
        return rows

    def labels(self, codes: torch.Tensor) -> torch.Tensor:
        """Return unshifted labels (F + C + 1, C): the codes and one EOS per codebook; the rest is ignored.

        The EOS teaches the model to stop. The padding around it carries no information.
        """
        num_codebooks, num_frames = codes.shape
        labels = codes.new_full((self.num_rows(num_frames), num_codebooks), IGNORE_INDEX)
        for k in range(num_codebooks):
            labels[k + 1 : k + 1 + num_frames, k] = codes[k]
            labels[k + 1 + num_frames, k] = self.eos_id
        return labels

    def revert(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes (C, F) of delayed rows (R, C), which start with the BOS row, up to the first EOS.

        Rows of a truncated generation have no EOS. Then every frame that has the codes of all codebooks is returned.
        """
        import torch

        num_rows, num_codebooks = rows.shape
        ends = (rows[:, 0] == self.eos_id).nonzero()
        num_frames = (int(ends[0]) if len(ends) else num_rows) - 1
        num_frames = max(0, min(num_frames, num_rows - num_codebooks))
        return torch.stack([rows[k + 1 : k + 1 + num_frames, k] for k in range(num_codebooks)])

    def has_ended(self, rows: torch.Tensor) -> bool:
        return bool((rows[-1] == self.eos_id).all())
