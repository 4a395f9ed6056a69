"""Validation: the training loss without dropout, summed over all samples of all ranks and divided once."""

from __future__ import annotations

from collections.abc import Iterator

from higgs_ds.common.distributed import rank, world_size
from higgs_ds.data.collate import Batch
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.sampler import share_of_rank
from higgs_ds.model.loss import accuracies, mean_losses
from higgs_ds.training.engine import Engine
from higgs_ds.training.signals import StopSignals


def validate(engine: Engine, data: Dataset, micro_batch_size: int, signals: StopSignals) -> dict[str, float] | None:
    """Return mean losses and accuracies over `data`, or None if a signal interrupts. Every rank must call this."""
    shares = share_of_rank(range(len(data)), micro_batch_size, rank(), world_size())
    stopped = False

    def batches() -> Iterator[Batch]:
        nonlocal stopped
        for indices in shares:
            stopped = signals.stop_reason() is not None
            if stopped:
                return
            yield data.batch(indices)

    sums, counts, hits = engine.evaluate(batches())
    if stopped:
        return None
    return mean_losses(sums, counts, engine.weights).metrics("val") | accuracies(hits, counts, "val")
