"""The state machine of generation, as in the runtimes: which codes a row may have, and when a clip has ended."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from higgs_ds.model.v3.layout import BOC_ID, EOC_ID


class CodeSampler:
    """Chooses row after row of B clips, which end at different rows.

    Codebook k begins in row k and is BOC before. Only codebook 0 may choose EOC. The next row forces EOC on it, each
    further row on one more codebook, and the clip has ended with the row in which all but the last codebook are forced.
    (The codes of the others in the row after the EOC are one frame more than codebook 0 has; they are not decoded.)
    All rows after that are EOC.
    """

    def __init__(
        self,
        num_codebooks: int,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        logits_processor: Any = None,
    ) -> None:
        """Choose the most probable codes, or draw them from torch's generator.

        Args:
            do_sample: by default, whether the temperature is above 0; without a temperature, it is 1.
            logits_processor: changes the scores (B x C, S) of what a row may have, before the codes are chosen.
        """
        self.num_codebooks = num_codebooks
        self.temperature = 1.0 if temperature is None else temperature
        self.is_greedy = self.temperature <= 0 or do_sample is False
        warpers = [] if self.is_greedy else _warpers(self.temperature, top_k, top_p)
        self._process = LogitsProcessorList([*(logits_processor or ()), *warpers])
        self.num_rows = 0
        # (B,): codebooks that are forced to EOC in the next row, from codebook 0 on; 0 before the EOC of codebook 0.
        self.num_ended = torch.zeros(0, dtype=torch.long)

    @property
    def has_ended(self) -> bool:
        """Whether all clips have ended."""
        return bool((self.num_ended >= self.num_codebooks).all())

    def next_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next row of each clip (B, C) from its logits (B, C, S)."""
        if self.num_rows == 0:
            self.num_ended = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        scores = self._process(None, self._masked(logits.float()).flatten(0, 1))
        codes = scores.argmax(-1) if self.is_greedy else torch.multinomial(scores.softmax(-1), 1)[:, 0]
        rows = codes.unflatten(0, (-1, self.num_codebooks))
        self.num_ended = torch.where(self.num_ended > 0, self.num_ended + 1, (rows[:, 0] == EOC_ID).long())
        self.num_rows += 1
        return rows

    def _masked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits with -inf for what a row must not have."""
        codebooks = torch.arange(self.num_codebooks, device=logits.device)
        ends = (self.num_ended > 0)[:, None]
        masked = logits.clone()
        masked[..., BOC_ID] = -torch.inf
        masked[..., EOC_ID] = masked[..., EOC_ID].masked_fill(ends | (codebooks > 0), -torch.inf)
        for code, forced in (
            (BOC_ID, ~ends & (codebooks > self.num_rows)),
            (EOC_ID, codebooks < self.num_ended[:, None]),
        ):
            masked = masked.masked_fill(forced[..., None], -torch.inf)
            masked[..., code] = masked[..., code].masked_fill(forced, 0.0)
        return masked


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> list[Any]:
    """Return what changes the probabilities, in the order of the runtimes."""
    chosen: list[Any] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen
