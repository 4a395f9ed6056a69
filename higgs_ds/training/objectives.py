"""What a step minimizes, and what is measured of it: the loss of all targets, or that of pairs of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from higgs_ds.data.collate import Batch
from higgs_ds.data.pairs import PairBatch
from higgs_ds.model.dpo import PairLosses, ipo_losses, sigmoid_losses
from higgs_ds.model.loss import LossWeights, Totals, accuracies, mean_losses, target_weights
from higgs_ds.options.fields import IPO
from higgs_ds.options.objective import ObjectiveOptions


class Objective(Protocol):
    """How the losses of targets become one loss. A window's `sizes` are sums over all its batches and all ranks."""

    @property
    def num_measures(self) -> int:
        """S."""

    def sizes(self, batch: Batch) -> torch.Tensor:
        """Return what a window's loss is divided by, float64; the first 1 + C are the numbers of targets."""

    def target_weights(self, sizes: torch.Tensor) -> torch.Tensor:
        """Return the weight of one target of each part in the losses that the model returns, float32 (1 + C,)."""

    def loss(self, losses: torch.Tensor, batch: Batch, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's share of a window's loss, and its measures (S,).

        Args:
            losses: weighted losses of the batch's targets (L + K,), as the model returns them.
        """

    def metrics(self, totals: Totals, prefix: str) -> dict[str, float]:
        """Return means by name."""


@dataclass(frozen=True)
class Supervised:
    """The loss of all targets: the mean of each part, weighted."""

    weights: LossWeights
    num_measures: int = 0

    def sizes(self, batch: Batch) -> torch.Tensor:
        return batch.target_counts()

    def target_weights(self, sizes: torch.Tensor) -> torch.Tensor:
        return target_weights(sizes, self.weights)

    def loss(self, losses: torch.Tensor, batch: Batch, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return losses.sum(), losses.new_zeros(0)

    def metrics(self, totals: Totals, prefix: str) -> dict[str, float]:
        losses = mean_losses(totals.sums, totals.counts, self.weights)
        return losses.metrics(prefix) | accuracies(totals.hits, totals.counts, prefix)


@dataclass(frozen=True)
class Preference:
    """The mean loss of pairs, and the weighted mean loss of the chosen samples' targets.

    The log-probability of a sample is the sum over all its targets; the weights of the text, the audio and the
    codebooks multiply their parts of it. Those of the codebooks have a mean of 1.
    """

    weights: LossWeights
    options: ObjectiveOptions
    num_measures: int = 9

    def _weights(self) -> torch.Tensor:
        """Return the weight of one target of each part, float64 (1 + C,)."""
        weights = self.weights.tensor()
        weights[1:] *= len(self.weights.codebooks)
        return weights

    def sizes(self, batch: Batch) -> torch.Tensor:
        """Return the numbers of targets; the weight of the chosen samples' targets, and the number of pairs."""
        assert isinstance(batch, PairBatch)
        chosen = batch.counts_of_rows()[0::2].sum(0) @ self._weights()
        pairs = torch.tensor(batch.num_samples // 2, dtype=torch.float64)
        return torch.cat([batch.target_counts(), torch.stack([chosen, pairs])])

    def target_weights(self, sizes: torch.Tensor) -> torch.Tensor:
        return self._weights().float().to(sizes.device)

    def log_probs(self, losses: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """Return the log-probability of each sample's targets, float64 (2 P,)."""
        rows = torch.zeros(batch.num_samples, dtype=torch.float64, device=losses.device)
        return -rows.index_add(0, batch.row_of_target.to(losses.device), losses.double())

    def loss(self, losses: torch.Tensor, batch: Batch, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(batch, PairBatch)
        log_probs = self.log_probs(losses, batch)
        of_rows = (batch.counts_of_rows() @ self._weights()).to(losses.device)
        found = self._pair_losses(log_probs, batch.reference.to(losses.device), of_rows)
        of_chosen, num_pairs = sizes[-2:]
        loss = found.losses.sum() / num_pairs - self.options.sft_weight * log_probs[0::2].sum() / of_chosen
        measures = [
            torch.full_like(found.losses, 1),
            found.losses.detach(),
            found.chosen,
            found.rejected,
            (found.chosen > found.rejected).double(),
            *(values.detach()[start::2] for values in (log_probs, of_rows) for start in (0, 1)),
        ]
        return loss, torch.stack([values.sum() for values in measures])

    def _pair_losses(self, log_probs: torch.Tensor, reference: torch.Tensor, of_rows: torch.Tensor) -> PairLosses:
        options = self.options
        if options.length_normalization:
            log_probs, reference = log_probs / of_rows, reference / of_rows
        if options.dpo_loss == IPO:
            return ipo_losses(log_probs, reference, options.beta)
        return sigmoid_losses(log_probs, reference, options.beta, options.label_smoothing)

    def metrics(self, totals: Totals, prefix: str) -> dict[str, float]:
        """Return the loss, and what TRL logs: rewards, and the mean log-probabilities of a target."""
        pairs, loss, chosen, rejected, right, *log_probs, of_chosen, of_rejected = totals.measures.tolist()
        log_chosen, log_rejected = log_probs[0] / of_chosen, log_probs[1] / of_rejected
        return {
            f"{prefix}/loss": loss / pairs - self.options.sft_weight * log_chosen,
            f"{prefix}/rewards/chosen": chosen / pairs,
            f"{prefix}/rewards/rejected": rejected / pairs,
            f"{prefix}/rewards/margins": (chosen - rejected) / pairs,
            f"{prefix}/rewards/accuracies": right / pairs,
            f"{prefix}/logps/chosen": log_chosen,
            f"{prefix}/logps/rejected": log_rejected,
        }


def objective_of(options: ObjectiveOptions, weights: LossWeights) -> Objective:
    return Preference(weights, options) if options.is_dpo else Supervised(weights)
