"""Losses that cannot be right: far from what any base gives at the start, or not finite, and whose they were."""

from __future__ import annotations

import math
from collections.abc import Sequence

from higgs_ds.common.distributed import gather_objects
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.loss import StepResult

NEAR_ZERO = 0.1
FAR_ABOVE_UNIFORM = 1.5  # times the loss of a model that takes all classes for equally likely
MAX_SKIPPED_STEPS, MAX_SKIPPED_SHARE = 10, 0.01
SHOWN = 8


def implausible_losses(text: float, audio: float, text_classes: int, audio_classes: int) -> list[str]:
    """What is wrong with the mean losses of a run's first step, with its likely cause; nan: without targets.

    A text loss near zero is no wonder: in speech samples, text targets are the tokens around the audio.
    """
    found = []
    if audio < NEAR_ZERO:
        found.append(
            f"the first audio loss is {audio:.3f}, near zero: the base knows these clips by heart (is it a "
            "model merged from a run on them?), or they hold nothing but silence; there is nothing left to learn"
        )
    for name, loss, classes, causes in (
        ("audio", audio, audio_classes, "codes of another codec than the base was trained with (--codec_ckpt)"),
        ("text", text, text_classes, "another tokenizer than the base's own"),
    ):
        if loss > FAR_ABOVE_UNIFORM * math.log(classes):
            found.append(
                f"the first {name} loss is {loss:.2f}, far above the {math.log(classes):.2f} of a guess among "
                f"{classes:,} classes: {causes}, or a base whose weights are damaged or not of this model"
            )
    return found


def may_skip_step(num_skipped: int, step: int) -> bool:
    """Whether one more step may be passed over, behind `num_skipped` of `step`."""
    return num_skipped < max(MAX_SKIPPED_STEPS, MAX_SKIPPED_SHARE * step)


def describe_skipped_step(number: int, step: StepResult, micro_batches: Sequence[Sequence[int]], data: Dataset) -> str:
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
