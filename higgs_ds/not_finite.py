"""A loss or gradient that is NaN or infinite: whose it was, and how many such steps a run may pass over."""

from __future__ import annotations

from collections.abc import Sequence

from higgs_ds.data.dataset import Dataset
from higgs_ds.distributed import gather_objects
from higgs_ds.engine import Step

PASSED_OVER_AT_MOST, SHARE_PASSED_OVER = 10, 0.01
SHOWN = 8


def may_pass_over(num_skipped: int, step: int) -> bool:
    """Whether one more step may be passed over, behind `num_skipped` of `step`."""
    return num_skipped < max(PASSED_OVER_AT_MOST, SHARE_PASSED_OVER * step)


def why_not_taken(number: int, step: Step, micro_batches: Sequence[Sequence[int]], data: Dataset) -> str:
    """Which ranks and samples a step that was not taken had its trouble from. Every rank must call this.

    A gradient is a sum over all samples: where all losses are finite, all samples of the step are named.
    """
    is_finite = step.sums.isfinite().all(dim=1).tolist()
    at_fault = [i for samples, fine in zip(micro_batches, is_finite, strict=True) if not fine for i in samples]
    everything = [i for samples in micro_batches for i in samples]
    by_rank = gather_objects((all(is_finite), data.sources(at_fault), data.sources(everything)))
    finite = all(fine for fine, _, _ in by_rank)
    what = "all losses are finite, the gradient is not" if finite else "the loss is NaN or infinite"
    ranks = [
        f"rank {rank}: {_some(everything if finite else at_fault)}"
        for rank, (fine, at_fault, everything) in enumerate(by_rank)
        if finite or not fine
    ]
    return f"step {number}: {what}, so it was not taken; its samples, by rank:\n  " + "\n  ".join(ranks)


def _some(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return ", ".join(sources[:SHOWN]) + more
