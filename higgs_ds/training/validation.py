"""Validation: the training loss without dropout, summed over all samples of all ranks and divided once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from higgs_ds.common.distributed import rank, world_size
from higgs_ds.data.collate import Batch
from higgs_ds.data.dataset import Dataset
from higgs_ds.data.sampler import share_of_rank
from higgs_ds.model.loss import Totals
from higgs_ds.training.engine import Engine
from higgs_ds.training.signals import StopSignals


def validate(engine: Engine, data: Dataset, micro_batch_size: int, signals: StopSignals) -> dict[str, float] | None:
    """Return mean losses and accuracies over `data`, or None if a signal interrupts. Every rank must call this.

    They are named val/..., and those with the averaged weights, if there are any, val_ema/.... Losses of one of several
    manifests are named val/MANIFEST/....
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
    """Return the metrics of all samples, and the losses of those of each manifest, if there are several."""
    totals: Totals | None = None
    of_manifests: dict[str, float] = {}
    for name, samples in (data.manifests or {"": range(len(data))}).items():
        if not samples:
            continue
        found = _sums(engine, data, samples, micro_batch_size, signals)
        if found is None:
            return None
        totals = found if totals is None else totals.plus(found)
        if data.manifests:
            means = engine.objective.metrics(found, f"{kind}/{name}")
            of_manifests |= {metric: mean for metric, mean in means.items() if re.search(r"loss$", metric)}
    assert totals is not None  # there is no validation without samples
    return engine.objective.metrics(totals, kind) | of_manifests


def _sums(
    engine: Engine, data: Dataset, samples: Sequence[int], micro_batch_size: int, signals: StopSignals
) -> Totals | None:
    """Return the totals of some samples over all ranks, or None if a signal interrupts."""
    shares = share_of_rank(samples, micro_batch_size, rank(), world_size())
    stopped = False

    def batches() -> Iterator[Batch]:
        nonlocal stopped
        for indices in shares:
            stopped = signals.stop_reason() is not None
            if stopped:
                return
            yield data.batch(indices)

    found = engine.evaluate(batches())
    return None if stopped else found
