"""Losses that cannot be right: implausible at the first step, or not finite; and the samples that caused them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from higgs_ds.common.distributed import gather_objects
from higgs_ds.data.collate import Batch
from higgs_ds.data.dataset import Dataset
from higgs_ds.model.loss import StepResult
from higgs_ds.training.engine import Engine

NEAR_ZERO = 0.1
FAR_ABOVE_UNIFORM = 1.5  # times the loss of a uniform distribution over all classes
MAX_SKIPPED_STEPS, MAX_SKIPPED_SHARE = 10, 0.01
SHOWN = 8  # samples that a message names


def implausible_losses(text: float, audio: float, text_classes: int, audio_classes: int) -> list[str]:
    """Return what is implausible about the mean losses of a run's first step, with likely causes; nan: no targets.

    A text loss near zero is plausible: in speech samples, the text targets are the tokens around the audio.
    """
    found = []
    if audio < NEAR_ZERO:
        found.append(
            f"the first audio loss is {audio:.3f}, near zero: the base has memorized these clips (is it a model "
            "merged from a run on them?), or they contain only silence; there is nothing left to learn"
        )
    for name, loss, classes, causes in (
        ("audio", audio, audio_classes, "codes of another codec than the one the base was trained with (--codec_ckpt)"),
        ("text", text, text_classes, "another tokenizer than the base's own"),
    ):
        if loss > FAR_ABOVE_UNIFORM * math.log(classes):
            found.append(
                f"the first {name} loss is {loss:.2f}, far above the {math.log(classes):.2f} of a uniform guess among "
                f"{classes:,} classes; likely causes: {causes}, or base weights that are damaged or of another model"
            )
    return found


def may_skip_step(num_skipped: int, step: int) -> bool:
    """Whether another step may be skipped after `num_skipped` of `step` steps."""
    return num_skipped < max(MAX_SKIPPED_STEPS, MAX_SKIPPED_SHARE * step)


def describe_skipped_step(number: int, step: StepResult, micro_batches: Sequence[Sequence[int]], data: Dataset) -> str:
    """Name the ranks and samples that caused a step to be skipped. Every rank must call this.

    A gradient is a sum over all samples: if all losses are finite, all samples of the step are named.
    """
    is_finite = step.sums.isfinite().all(dim=1).tolist()
    at_fault = [i for samples, fine in zip(micro_batches, is_finite, strict=True) if not fine for i in samples]
    everything = [i for samples in micro_batches for i in samples]
    by_rank = gather_objects((all(is_finite), data.sources(at_fault), data.sources(everything)))
    finite = all(fine for fine, _, _ in by_rank)
    what = "all losses are finite, the gradient is not" if finite else "the loss is NaN or infinite"
    if step.at_minimum:
        what = "the gradients overflow in fp16 at the minimum of the loss scale"
    ranks = [
        f"rank {rank}: {_join_first(everything if finite else at_fault)}"
        for rank, (fine, at_fault, everything) in enumerate(by_rank)
        if finite or not fine
    ]
    return f"step {number}: {what}, so the step was not applied; its samples by rank:\n  " + "\n  ".join(ranks)


def describe_first_module(engine: Engine, batches: Sequence[Batch]) -> str:
    """Name the first module on each rank whose output is not finite, in the order of computation; empty if none is.

    The forward passes are run again, without dropout. Every rank must call this.
    """
    found: list[str] = []

    def check(name: str, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        tensors = [tensor for tensor in tree_leaves(outputs) if torch.is_tensor(tensor)]
        if not found and not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(name.replace(".base_layer", ""))

    named = [(name, module) for name, module in engine.engine.module.higgs.named_modules() if name]
    handles = [module.register_forward_hook(partial(check, name)) for name, module in named]
    engine.evaluate(batches)
    for handle in handles:
        handle.remove()
    by_rank = [f"rank {rank}: {names[0]}" for rank, names in enumerate(gather_objects(found)) if names]
    return f"\nThe first output out of fp16's range is that of this module: {', '.join(by_rank)}" if by_rank else ""


def _join_first(sources: Sequence[str]) -> str:
    more = f" and {len(sources) - SHOWN} more" if len(sources) > SHOWN else ""
    return ", ".join(sources[:SHOWN]) + more
