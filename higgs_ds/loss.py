"""Cross-entropy sums of the text and of each codebook, and the one way in which they become a loss.

Everywhere: sum, count, add up over micro-batches and ranks, divide once. Averages of averages would weigh a token by
how full its micro-batch happened to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def loss_sums(
    text_logits: torch.Tensor, text_targets: torch.Tensor, audio_logits: torch.Tensor, audio_targets: torch.Tensor
) -> torch.Tensor:
    """Summed cross entropies, float32 (1 + C,): text, then each codebook.

    Args:
        text_logits: (M, V); text_targets: (M,).
        audio_logits: (K, C, S) over the S codes of each codebook; audio_targets: (K, C), -100 for none.
    """
    text = F.cross_entropy(text_logits.float(), text_targets, reduction="sum")
    audio = F.cross_entropy(audio_logits.float().transpose(1, 2), audio_targets, reduction="none")
    return torch.cat([text[None], audio.sum(dim=0)])


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
        """Float64 (1 + C,), in the order of `loss_sums`."""
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


def mean_losses(sums: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> Losses:
    """Divide sums (1 + C,) by counts (1 + C,), and weigh them into a total; a part without targets adds nothing."""
    means = sums.double().cpu() / counts.cpu()
    total = (weights.tensor() * means).nansum()
    codebooks = torch.tensor(weights.codebooks, dtype=torch.float64)
    return Losses(float(total), float(means[0]), float((codebooks * means[1:]).sum()), means[1:].tolist())


def target_weights(counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """What one target of each part weighs in the loss of a whole window with `counts` (1 + C,) targets; float32."""
    return (weights.tensor().to(counts.device) / counts.clamp(min=1)).float()
