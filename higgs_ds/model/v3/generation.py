"""The state machine of generation, as in the runtimes: which codes a row may have, and when a clip has ended."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from higgs_ds.model.v3.layout import BOC_ID, EOC_ID


class CodeSampler:
    """Chooses row after row of one clip.

    Codebook k begins in row k and is BOC before. Only codebook 0 may choose EOC. The next row forces EOC on it, each
    further row on one more codebook, and the clip has ended with the row in which all but the last codebook are forced.
    (The codes of the others in the row after the EOC are one frame more than codebook 0 has; they are not decoded.)
    """

    def __init__(
        self,
        num_codebooks: int,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        """Choose the most probable codes, or draw them from torch's generator.

        Args:
            do_sample: by default, whether the temperature is above 0; without a temperature, it is 1.
        """
        self.num_codebooks = num_codebooks
        self.temperature = 1.0 if temperature is None else temperature
        self.is_greedy = self.temperature <= 0 or do_sample is False
        self._warp = LogitsProcessorList(_warpers(self.temperature, top_k, top_p) if not self.is_greedy else [])
        self.num_rows = 0
        self.num_ended: int | None = None  # codebooks that are forced to EOC in the next row, from codebook 0 on

    @property
    def has_ended(self) -> bool:
        return self.num_ended is not None and self.num_ended >= self.num_codebooks

    def next_row(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next row (C,) from its logits (C, S)."""
        masked = self._masked(logits.float())
        if self.is_greedy:
            row = masked.argmax(-1)
        else:
            probabilities = self._warp(None, masked).softmax(-1)
            row = torch.multinomial(probabilities, 1)[:, 0]
        if self.num_ended is not None:
            self.num_ended += 1
        elif row[0] == EOC_ID:
            self.num_ended = 1
        self.num_rows += 1
        return row

    def _masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits with -inf for what a row must not have."""
        codebooks = torch.arange(self.num_codebooks, device=logits.device)
        masked = logits.clone()
        masked[:, BOC_ID] = -torch.inf
        if self.num_ended is None:
            masked[1:, EOC_ID] = -torch.inf
            forced, code = codebooks > self.num_rows, BOC_ID
        else:
            masked[:, EOC_ID] = -torch.inf
            forced, code = codebooks < self.num_ended, EOC_ID
        masked[forced] = -torch.inf
        masked[forced, code] = 0.0
        return masked


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> list[Any]:
    """Return what changes the probabilities, in the order of the runtimes."""
    chosen: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen
