"""The losses of preference tuning: DPO (Rafailov et al. 2023, arXiv 2305.18290), IPO (Azar et al. 2023, 2310.12036).

With p the log-probability of a sample's targets, r that under the reference model, and h the difference of p - r
between the chosen and the rejected sample of a pair, the loss of the pair is, for smoothing s (Mitchell 2023):

    sigmoid:  -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
    ipo:      (h - 1 / (2 beta))^2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PairLosses:
    """The loss of each pair (P,), and the rewards of its chosen and rejected sample: beta (p - r), (P,) each."""

    losses: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor


def sigmoid_losses(
    log_probs: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> PairLosses:
    """Compute the losses of pairs whose samples alternate, chosen and rejected: (2 P,) each, float64."""
    rewards = beta * (log_probs - reference)
    chosen, rejected = rewards[0::2], rewards[1::2]
    h = chosen - rejected
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return PairLosses(losses, chosen.detach(), rejected.detach())


def ipo_losses(log_probs: torch.Tensor, reference: torch.Tensor, beta: float) -> PairLosses:
    """Compute the same for IPO."""
    ratios = log_probs - reference
    chosen, rejected = ratios[0::2], ratios[1::2]
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())
