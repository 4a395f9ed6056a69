"""The audio stream: a clip's codes as delayed rows, one for each position of the model. Codebook k is k rows late."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AudioStream(ABC):
    """The shape of the audio stream: the number of codebooks, and the two special codes after their entries.

    Codes are (C, F), int64: of C codebooks and F frames. Rows are (R, C).
    """

    num_codebooks: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def num_rows(self, num_frames: int) -> int:
        """Return the number of rows of a clip of F frames."""

    @abstractmethod
    def delay(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the rows (R, C) of codes (C, F)."""

    @abstractmethod
    def labels(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what is learned of each row (R, C), unshifted: IGNORE_INDEX where nothing is."""

    @abstractmethod
    def revert(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the codes (C, F) of generated rows (R, C), up to their end.

        Rows of a truncated generation have no end. Then every frame that has the codes of all codebooks is returned.
        """

    @abstractmethod
    def has_ended(self, rows: torch.Tensor) -> bool:
        """Return whether generated rows (R, C) end as the model ends a clip on its own."""
