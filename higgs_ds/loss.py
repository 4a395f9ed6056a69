"""Cross-entropy sums of the text and of each codebook, and the one way in which they become a loss.

Everywhere: sum, count, add up over micro-batches and ranks, divide once. Averages of averages would weigh a token by
how full its micro-batch happened to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # the ignore_index of torch's cross entropy


LOGITS_AT_ONCE = 2**20  # numbers that are in memory together, 4 MiB in float32


def head_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of a frozen head's logits, in chunks: logits of all rows never are in memory together.

    The gradient of `hidden` is made chunk by chunk in the forward pass, while the logits are there (as in Liger Kernel,
    Hsu et al. 2024, arXiv 2410.10989); nothing else is kept for the backward pass.

    Args:
        hidden: (K, H); head: (P x S, H), for P parts of S classes each.
        targets: (K, P), -100 for none; target_weights: float32 (P,), what one target of each part weighs.

    Returns the weighted loss, a float32 scalar, and the detached sums of each part, float32 (P,).
    """
    return _HeadLoss.apply(hidden, head, targets, target_weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, target_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_parts = targets.shape[1]
        sums = torch.zeros(num_parts, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, LOGITS_AT_ONCE // len(head))
        for start in range(0, len(hidden), step):
            rows, wanted = hidden[start : start + step], targets[start : start + step]
            logits = F.linear(rows, head).float().view(len(rows), num_parts, -1)
            sums += F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(dim=0)
            if gradient is not None:
                # Of a cross entropy by its logits: the probabilities, less 1 at the target.
                there = wanted != IGNORE_INDEX
                slope = logits.softmax(dim=-1)
                slope.scatter_add_(2, wanted.clamp(min=0)[..., None], -torch.ones_like(slope[..., :1]))
                slope *= (target_weights * there)[..., None]
                gradient[start : start + step] = slope.flatten(1).to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * target_weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


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


def mean_losses(sums: torch.Tensor, counts: torch.Tensor, weights: LossWeights) -> Losses:
    """Divide sums (1 + C,) by counts (1 + C,), and weigh them into a total; a part without targets adds nothing."""
    means = sums.double().cpu() / counts.cpu()
    total = (weights.tensor() * means).nansum()
    codebooks = torch.tensor(weights.codebooks, dtype=torch.float64)
    return Losses(float(total), float(means[0]), float((codebooks * means[1:]).sum()), means[1:].tolist())


def target_weights(counts: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """What one target of each part weighs in the loss of a whole window with `counts` (1 + C,) targets; float32."""
    return (weights.tensor().to(counts.device) / counts.clamp(min=1)).float()
