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
    """Return mean losses and accuracies over `data`, or None if a signal interrupts. Every rank must call this.

    They are named val/..., and those with the averaged weights, if there are any, val_ema/....
    """
    values = _validate(engine, data, micro_batch_size, signals, "val")
    if values is None or not engine.keeps_average:
        return values
    with engine.averaged_weights():
        averaged = _validate(engine, data, micro_batch_size, signals, "val_ema")
    return None if averaged is None else values | averaged


def _validate(
    engine: Engine, data: Dataset, micro_batch_size: int, signals: StopSignals, kind: str
) -> dict[str, float] | None:
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
    return mean_losses(sums, counts, engine.weights).metrics(kind) | accuracies(hits, counts, kind)
