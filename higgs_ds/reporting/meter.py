"""Sums and counts between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from higgs_ds.common.distributed import is_main, rank, sum_over_ranks, world_size
from higgs_ds.data.collate import Batch
from higgs_ds.model.loss import StepResult, Totals


class Means(Protocol):
    """The part of an objective that makes means of sums; see `training.objectives`."""

    @property
    def num_measures(self) -> int: ...

    def metrics(self, totals: Totals, prefix: str) -> dict[str, float]: ...


class Meter:
    """Sums and counts of the steps since the last log line; reduced over ranks and divided only when asked."""

    def __init__(self, means: Means, num_codebooks: int, device: torch.device) -> None:
        self.means = means
        self.num_parts = 1 + num_codebooks
        self.device = device
        self.paused_at: float | None = None
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.sums = torch.zeros(self.num_parts, dtype=torch.float64, device=self.device)
        self.counts = torch.zeros_like(self.sums)
        self.hits = self.sums.new_zeros(self.num_parts + 2)
        self.measures = self.sums.new_zeros(self.means.num_measures)
        self.num_samples = 0
        self.num_tokens = 0
        self.num_positions = 0  # including padding
        self.started_at = self._now()

    def _now(self) -> float:
        """Return the time in seconds, which stands still while the meter is paused."""
        return time.perf_counter() if self.paused_at is None else self.paused_at

    def add(self, step: StepResult, batches: Sequence[Batch]) -> None:
        """Add one step. A skipped step counts towards time and speed, but not towards losses and accuracies."""
        self.steps += 1
        if step.applied:
            self.sums += step.sums.sum(0)
            self.counts += step.counts
            self.hits += step.hits
            self.measures += step.measures
        self.num_samples += sum(batch.num_samples for batch in batches)
        self.num_tokens += sum(batch.num_tokens for batch in batches)
        self.num_positions += sum(batch.places.numel() for batch in batches)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of a block, which is not training, from the speed."""
        self.paused_at = time.perf_counter()
        yield
        self.started_at += time.perf_counter() - self.paused_at
        self.paused_at = None

    def state(self) -> dict[str, Any]:
        """Return what this rank has added since the last log line, as JSON values."""
        added = {name: getattr(self, name).tolist() for name in ("sums", "counts", "hits", "measures")}
        return added | {name: getattr(self, name) for name in ("num_samples", "num_tokens", "num_positions", "steps")}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Continue from the `state` of every rank of an earlier run; if their number differs, rank 0 takes all."""
        if not states:
            return
        mine = states if len(states) != world_size() else [states[rank()]]
        if len(states) == world_size() or is_main():
            for name in ("sums", "hits", "measures"):
                # Checkpoints of earlier versions have no measures: their runs had none.
                added = torch.tensor([state.get(name, []) for state in mine], dtype=torch.float64).sum(0)
                setattr(self, name, getattr(self, name) + added.to(self.device))
            for name in ("num_samples", "num_tokens", "num_positions"):
                setattr(self, name, getattr(self, name) + sum(state[name] for state in mine))
        self.counts += torch.tensor(states[0]["counts"], dtype=torch.float64).to(self.device)
        self.steps += states[0]["steps"]

    def read(self) -> dict[str, float]:
        """Return mean losses, accuracies, padding and speed since the last reset, over all ranks.

        Losses and accuracies are missing if all steps were skipped. Every rank must call this.
        """
        local_sizes = [self.num_samples, self.num_tokens, self.num_positions]
        sizes = torch.tensor(local_sizes, dtype=torch.float64, device=self.device)
        num_samples, num_tokens, num_positions = sum_over_ranks(sizes).tolist()
        sums, hits, measures = map(sum_over_ranks, (self.sums, self.hits, self.measures))
        totals = Totals(sums, self.counts, hits, measures)  # the counts are those of all ranks already
        means = self.means.metrics(totals, "train") if self.counts.any() else {}
        seconds = self._now() - self.started_at
        speed = {
            "samples_per_s": num_samples / seconds,
            "tokens_per_s": num_tokens / seconds,
            "step_time_s": seconds / self.steps,
        }
        return means | {"padding": 1 - num_tokens / num_positions} | speed
