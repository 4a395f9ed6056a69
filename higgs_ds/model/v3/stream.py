"""The audio stream of Higgs Audio v3: a clip of F frames is F + C - 1 rows, without a row of BOC in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.stream import AudioStream

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BareStream(AudioStream):
    """A stream whose runtimes force every BOC, and every EOC but that of the first codebook.

    `train_fill`: whether the forced codes are learned, too. It changes the loss, and nothing that is heard.
    """

    train_fill: bool = False

    def num_rows(self, num_frames: int) -> int:
        """Return the number of rows of a delayed clip: its frames, and the last codebook's delay."""
        return num_frames + self.num_codebooks - 1

    def delay(self, codes: torch.Tensor) -> torch.Tensor:
        """Delay codes (C, F) into rows (F + C - 1, C): row r holds of codebook k the code r - k, else BOC or EOC."""
        num_codebooks, num_frames = codes.shape
        rows = codes.new_full((self.num_rows(num_frames), num_codebooks), self.eos_id)
        for k in range(num_codebooks):
            rows[:k, k] = self.bos_id
            rows[k : k + num_frames, k] = codes[k]
        return rows

    def labels(self, codes: torch.Tensor) -> torch.Tensor:
        """Return unshifted labels (F + C - 1, C): the codes, and the first codebook's EOC, which ends the clip."""
        if self.train_fill:
            return self.delay(codes)
        num_codebooks, num_frames = codes.shape
        labels = codes.new_full((self.num_rows(num_frames), num_codebooks), IGNORE_INDEX)
        for k in range(num_codebooks):
            labels[k : k + num_frames, k] = codes[k]
        labels[num_frames : num_frames + 1, 0] = self.eos_id
        return labels

    def revert(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes (C, F) of rows (R, C) up to the first codebook's EOC.

        Rows of a truncated generation have no EOC. Then every frame that has the codes of all codebooks is returned.
        """
        import torch

        num_rows, num_codebooks = rows.shape
        ends = (rows[:, 0] == self.eos_id).nonzero()
        num_frames = int(ends[0]) if len(ends) else num_rows
        num_frames = max(0, min(num_frames, num_rows - num_codebooks + 1))
        return torch.stack([rows[k : k + num_frames, k] for k in range(num_codebooks)])

    def has_ended(self, rows: torch.Tensor) -> bool:
        return bool((rows[-1, :-1] == self.eos_id).all())
