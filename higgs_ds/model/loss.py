"""From sums of cross-entropies to one loss: sum, count, add up over micro-batches and ranks, divide once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE_INDEX = -100  # the ignore_index of torch's cross entropy


@dataclass(frozen=True)
class LossWeights:
    """What each part weighs in the total; the codebooks' weights sum to 1."""

    text: float
    audio: float
    codebooks: tuple[float, ...]

    @classmethod
    def of(cls, text: float, audio: float, num_codebooks: int, codebooks: Sequence[float] | None) -> LossWeights:
        """All codebooks alike (1/8 each, as in the original model) unless weights are given."""
        raw = codebooks or [1.0] * num_codebooks
        return cls(text, audio, tuple(weight / sum(raw) for weight in raw))

    def tensor(self) -> torch.Tensor:
        """Float64 (1 + C,), text, then each codebook."""
        return torch.tensor([self.text, *(self.audio * weight for weight in self.codebooks)], dtype=torch.float64)


@dataclass(frozen=True)
class Losses:
    """Means over all targets that were counted; nan where there were none."""

    total: float
    text: float
    audio: float
    codebooks: list[float]

    def metrics(self, prefix: str) -> dict[str, float]:
        named = {f"{prefix}/loss": self.total, f"{prefix}/text_loss": self.text, f"{prefix}/audio_loss": self.audio}
        return named | {f"{prefix}/audio_loss/cb{k}": loss for k, loss in enumerate(self.codebooks)}


def accuracies(hits: torch.Tensor, counts: torch.Tensor, prefix: str) -> dict[str, float]:
    """Shares of targets that were the likeliest; none of a part without targets.

    Args:
        hits: (1 + C + 2,), of text, of each codebook, of the codes that end a stream, and how many of these there were.
        counts: (1 + C,), targets of text and of each codebook.
    """
    hits, counts = hits.double().cpu(), counts.double().cpu()
    shares = {
        "text_accuracy": (hits[0], counts[0]),
        "audio_accuracy": (hits[1:-2].sum(), counts[1:].sum()),
        "eos_accuracy": (hits[-2], hits[-1]),
    }
    return {f"{prefix}/{name}": float(hit / count) for name, (hit, count) in shares.items() if count}


def mean_losses(sums: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> Losses:
    """Divide sums (1 + C,) by counts (1 + C,), and weigh them into a total; a part without targets adds nothing."""
    means = sums.double().cpu() / counts.cpu()
    total = (weights.tensor() * means).nansum()
    codebooks = torch.tensor(weights.codebooks, dtype=torch.float64)
    return Losses(float(total), float(means[0]), float((codebooks * means[1:]).sum()), means[1:].tolist())


def target_weights(counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """What one target of each part weighs in the loss of a whole window with `counts` (1 + C,) targets; float32."""
    return (weights.tensor().to(counts.device) / counts.clamp(min=1)).float()


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step was made from, and whether it was taken.

    sums: this rank's loss sums of each micro-batch, float32 (M, 1 + C); counts: targets of all ranks, float64 (1 + C,).
    hits: of this rank's targets, how many were the likeliest, as the model tells it, float32 (1 + C + 2,).
    taken: False where a loss or a gradient of any rank was not finite. Nothing but the schedule has moved then.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    hits: torch.Tensor
    applied: bool
