"""Codebooks with the same code in all the data: their loss is soon 0, and makes the mean of all look small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from higgs_ds.common import distributed
from higgs_ds.common.console import say, warn
from higgs_ds.common.words import counted, listed
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.labels import IGNORE_INDEX
from higgs_ds.model.loss import LossWeights

MOST_CHECKED = 1000  # samples


@dataclass
class ConstantCodebooks:
    """Codebooks whose labels were all equal in the samples that were checked, but for those that end a stream."""

    numbers: tuple[int, ...]
    num_checked: int
    weights: LossWeights
    is_expected: bool = False
    was_reported: bool = False

    @classmethod
    def of(cls, data: Dataset, weights: LossWeights, is_expected: bool) -> ConstantCodebooks:
        """Find those of a training. Every rank must call this. Raises InputError if codes are missing.

        Args:
            is_expected: whether the codec is that of a built-in base, which uses some of its codebooks only.
        """
        numbers, num_checked = distributed.on_main(lambda: find_constant(data))
        return cls(tuple(numbers), num_checked, weights, is_expected)

    def losses_of_others(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the audio losses without these codebooks, by metric name; nothing if there are none, or no others."""
        shares = self.weights.codebooks
        others = [k for k in range(len(shares)) if k not in self.numbers and shares[k]]
        total = sum(shares[k] for k in others)
        if not self.numbers or not others:
            return {}
        return {
            f"{kind}/audio_loss_varying": sum(shares[k] * values[f"{kind}/audio_loss/cb{k}"] for k in others) / total
            for kind in ("train", "val", "val_ema")
            if f"{kind}/audio_loss" in values
        }

    def report_once(self, step: int, values: Mapping[str, float]) -> None:
        """Print the losses with and without these codebooks, once: a warning, unless they are expected."""
        loss = values.get("train/audio_loss", math.nan)
        if self.was_reported or not self.numbers or math.isnan(loss):
            return
        self.was_reported = True
        (say if self.is_expected else warn)(self._describe(step, loss, values.get("train/audio_loss_varying")))

    def _describe(self, step: int, loss: float, of_others: float | None) -> str:
        plural = "s" if len(self.numbers) > 1 else ""
        which = f"codebook{plural} {listed(self.numbers)} of {len(self.weights.codebooks)}"
        without = f"without {'them' if plural else 'it'} {of_others or math.nan:.4f} (train/audio_loss_varying)"
        if of_others is None:
            without = "no other codebook has a weight"
        losses = f"the mean audio loss looks small for that: at step {step} it is {loss:.4f}, {without}"
        if self.is_expected:
            return f"note: {which}: unused by the codec of the built-in base; {losses}"
        return (
            f"warning: {which}: the same code in {counted(self.num_checked, 'training sample')}, all that were checked"
            f"; {losses}. Listen to recordings that went through this codec: does it code such voices?"
        )


def find_constant(data: Dataset) -> tuple[list[int], int]:
    """Return the codebooks that are constant in the data, and the number of samples that were checked.

    Checking ends as soon as none is left, usually with the first sample. At most MOST_CHECKED samples are checked.
    """
    bos_id = data.coder.stream.bos_id  # the lowest of the codes that are no sound
    lowest = torch.full((data.coder.stream.num_codebooks,), bos_id)
    highest = torch.full_like(lowest, -1)
    num_checked = 0
    for index in np.unique(np.linspace(0, len(data) - 1, min(len(data), MOST_CHECKED)).astype(int)):
        targets = data.batch([int(index)]).audio_targets
        is_sound = (targets != IGNORE_INDEX) & (targets < bos_id)
        if not len(targets):
            continue
        num_checked += 1
        lowest = lowest.minimum(targets.where(is_sound, bos_id).amin(dim=0))
        highest = highest.maximum(targets.where(is_sound, -1).amax(dim=0))
        if bool((lowest < highest).all()):
            break
    return (highest == lowest).nonzero()[:, 0].tolist(), num_checked
