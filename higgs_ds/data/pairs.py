"""Pairs of samples for preference tuning: their dataset and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from higgs_ds.data.collate import Batch
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.labels import IGNORE_INDEX

NO_REFERENCE = torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class PairBatch(Batch):
    """A micro-batch of P pairs: row 2 i has the chosen sample of pair i, row 2 i + 1 the rejected one.

    `reference`: log-probability of each row's targets under the model at the start of the run, float64 (2 P,); empty
    as long as it is not known.
    """

    reference: torch.Tensor = NO_REFERENCE

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in super().tensors(device).items() if name != "reference"}

    @property
    def row_of_target(self) -> torch.Tensor:
        """The row that each target is in (L + K,): those of the text, then those of the audio."""
        places = torch.cat([self.text_places, self.audio_places])
        return self.positions[places] // self.places.shape[1]

    def counts_of_rows(self) -> torch.Tensor:
        """Return the number of each row's targets, float64 (2 P, 1 + C): text, then each codebook."""
        is_audio = self.audio_targets != IGNORE_INDEX
        of_text = torch.zeros(len(self.text_targets), 1 + is_audio.shape[1], dtype=torch.float64)
        of_text[:, 0] = 1
        of_audio = torch.cat([torch.zeros(len(is_audio), 1), is_audio], dim=1).double()
        counts = torch.zeros(self.num_samples, of_text.shape[1], dtype=torch.float64)
        return counts.index_add(0, self.row_of_target, torch.cat([of_text, of_audio]))


@dataclass(frozen=True)
class PairDataset(Dataset):
    """A dataset whose samples 2 i and 2 i + 1 are the chosen and the rejected one of pair i.

    `reference`: as in `PairBatch`, of all samples, float64 (N,).
    """

    reference: np.ndarray | None = None

    @property
    def group_lengths(self) -> list[int]:
        """Number of tokens of the longer sample of each pair."""
        return np.array(self.lengths).reshape(-1, 2).max(axis=1).tolist()

    def batch(self, indices: Sequence[int], epoch: int | None = None) -> PairBatch:
        batch = super().batch(indices, epoch)
        reference = NO_REFERENCE if self.reference is None else torch.from_numpy(self.reference[list(indices)])
        return PairBatch(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, reference=reference)

    def alternating(self) -> Iterator[int]:
        """Yield the chosen samples only: the rejected ones have the same prompts."""
        return (index for index in super().alternating() if index % 2 == 0)
