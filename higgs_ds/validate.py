"""Validation: the training loss without dropout, over all samples of all ranks, divided once."""

from __future__ import annotations

from higgs_ds.data.dataset import Dataset
from higgs_ds.data.sampler import share_of_rank
from higgs_ds.distributed import rank, world_size
from higgs_ds.engine import Engine
from higgs_ds.loss import mean_losses


def validate(engine: Engine, data: Dataset, micro_batch_size: int) -> dict[str, float]:
    """Mean losses over `data`. Every rank must call this."""
    shares = share_of_rank(range(len(data)), micro_batch_size, rank(), world_size())
    sums, counts = engine.evaluate(data.batch(indices) for indices in shares)
    return mean_losses(sums, counts, engine.weights).metrics("val")
