"""Checks before the first step: disk space for everything that a run writes, and the time until the job's limit."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import free_bytes
from higgs_ds.common.words import counted
from higgs_ds.options.fields import NATIVE
from higgs_ds.options.run import RunOptions
from higgs_ds.training.intervals import is_due

GIB = 2**30


def check_room(
    output_dir: Path,
    state: TrainerState,
    options: RunOptions,
    trained_bytes: int,
    base_bytes: int,
    is_full_finetuning: bool = False,
    averaged: bool = False,
) -> None:
    """Raise InputError if the disk has less free space than the rest of a run needs.

    Args:
        trained_bytes: size of what is trained, in float32: the adapter, or with `is_full_finetuning` the weights.
        base_bytes: size of the base's weights, and so of a merged or complete model's.
        averaged: whether averages of what is trained are saved beside it.
    """
    saves = sum(
        step == state.total_steps or is_due(step, options.save_steps)
        for step in range(state.step + 1, state.total_steps + 1)
    )
    # The checkpoints that are kept, the best one, and a new one, which is saved before an old one is deleted.
    at_once = saves if options.keep_checkpoints is None else min(saves, options.keep_checkpoints + 2)
    takes = {
        # The trained weights, Adam's two moments, and averages.
        counted(at_once, "checkpoint"): at_once * (4 if averaged else 3) * trained_bytes,
    }
    model_bytes = (1 if options.export_layout == NATIVE else 2) * base_bytes  # others are converted from native
    if is_full_finetuning:
        takes["the complete model"] = model_bytes
    else:
        takes["adapters"] = (4 if averaged else 2) * trained_bytes  # the old ones and the new ones
    if options.merge_adapter_with_base and not is_full_finetuning:
        takes |= {"their copies": 4 * trained_bytes, "the merged model": model_bytes}
    needed, free = sum(takes.values()), free_bytes(output_dir)
    if needed > free:
        parts = ", ".join(f"{size / GIB:.2f} GiB for {what}" for what, size in takes.items())
        raise InputError(
            f"--output_dir {output_dir}: {free / GIB:.2f} GiB are free, and the run writes {needed / GIB:.2f} GiB "
            f"({parts}); choose another folder, save less often (--save_steps), or keep fewer checkpoints "
            "(--keep_checkpoints)"
        )


def seconds_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds until this Slurm job's time limit; None outside of Slurm, or if Slurm does not report it."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdecimal() else None
