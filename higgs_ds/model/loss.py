"""Combine sums of cross-entropies into one loss: sum and count over micro-batches and ranks, then divide once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part in the total loss. The weights of the codebooks sum to 1."""

    text: float
    audio: float
    codebooks: tuple[float, ...]

    @classmethod
    def of(cls, text: float, audio: float, num_codebooks: int, codebooks: Sequence[float] | None) -> LossWeights:
        """Normalize the codebooks' weights. Without weights, all are equal (1/8 each, as in the original model)."""
        raw = codebooks or [1.0] * num_codebooks
        return cls(text, audio, tuple(weight / sum(raw) for weight in raw))

    def tensor(self) -> torch.Tensor:
        """Return the weights as float64 (1 + C,): text, then each codebook."""
        return torch.tensor([self.text, *(self.audio * weight for weight in self.codebooks)], dtype=torch.float64)


@dataclass(frozen=True)
class Losses:
    """Mean losses over all counted targets; nan for a part without targets."""

    total: float
    text: float
    audio: float
    codebooks: list[float]
    has_text: bool = True

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the losses by name; that of the text only where there is some to learn."""
        named = {f"{prefix}/loss": self.total, f"{prefix}/text_loss": self.text, f"{prefix}/audio_loss": self.audio}
        if not self.has_text:
            del named[f"{prefix}/text_loss"]
        return named | {f"{prefix}/audio_loss/cb{k}": loss for k, loss in enumerate(self.codebooks)}


def accuracies(hits: torch.Tensor, counts: torch.Tensor, prefix: str) -> dict[str, float]:
    """Return the accuracies: shares of targets that had the highest logit. A part without targets is left out.

    Args:
        hits: (1 + C + 2,), correct predictions of text, of each codebook and of the codes that end a stream, and the
            number of targets that end a stream.
        counts: (1 + C,), number of targets of text and of each codebook.
    """
    hits, counts = hits.double().cpu(), counts.double().cpu()
    shares = {
        "text_accuracy": (hits[0], counts[0]),
        "audio_accuracy": (hits[1:-2].sum(), counts[1:].sum()),
        "eos_accuracy": (hits[-2], hits[-1]),
    }
    return {f"{prefix}/{name}": float(hit / count) for name, (hit, count) in shares.items() if count}


def mean_losses(sums: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> Losses:
    """Divide sums (1 + C,) by counts (1 + C,) and weight them into a total; a part without targets adds nothing."""
    means = sums.double().cpu() / counts.cpu()
    total = (weights.tensor() * means).nansum()
    codebooks = torch.tensor(weights.codebooks, dtype=torch.float64)
    audio = float((codebooks * means[1:]).sum())
    return Losses(float(total), float(means[0]), audio, means[1:].tolist(), has_text=bool(counts[0]))


def target_weights(counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """Return the loss weight of one target of each part, float32 (1 + C,), for a window with `counts` targets."""
    return (weights.tensor().to(counts.device) / counts.clamp(min=1)).float()


@dataclass(frozen=True)
class StepResult:
    """The losses of an optimizer step, and whether it was applied.

    sums: this rank's loss sums of each micro-batch, float32 (M, 1 + C).
    counts: number of targets on all ranks, float64 (1 + C,).
    hits: this rank's correct predictions, as `LossModel` returns them, float32 (1 + C + 2,).
    measures: what the objective measures besides, on this rank, (S,).
    applied: False if a loss or a gradient of any rank was not finite. Then only the schedule has advanced.
    overflows: in fp16, how often the gradients overflowed. Each time but the last, the loss scale was lowered.
    at_minimum: True if they still overflow at the minimum of the loss scale.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    hits: torch.Tensor
    measures: torch.Tensor
    applied: bool
    overflows: int = 0
    at_minimum: bool = False


class Totals(NamedTuple):
    """Sums over batches: of losses and numbers of targets, float64 (1 + C,); of hits, (1 + C + 2,); and of what the
    objective measures besides, float64 (S,)."""

    sums: torch.Tensor
    counts: torch.Tensor
    hits: torch.Tensor
    measures: torch.Tensor

    def plus(self, other: Totals) -> Totals:
        return Totals(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
