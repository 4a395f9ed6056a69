"""Before the first step: whether there is room for all that a run will write, and time for it to end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from higgs_ds.checkpoints.state import TrainerState
from higgs_ds.common.errors import InputError
from higgs_ds.common.files import free_bytes
from higgs_ds.options.fields import NATIVE
from higgs_ds.options.train import RunOptions

GIB = 2**30


def check_room(
    output_dir: Path,
    state: TrainerState,
    options: RunOptions,
    trained_bytes: int,
    base_bytes: int,
    is_full_finetuning: bool = False,
) -> None:
    """Raise InputError where a disk has less room than the rest of a run takes.

    Args:
        trained_bytes: of what is trained, in float32: an adapter, or weights `is_full_finetuning`.
        base_bytes: of the base's weights, and so of a merged or complete model's.
    """
    saves = sum(
        step == state.total_steps or step % options.save_steps == 0
        for step in range(state.step + 1, state.total_steps + 1)
    )
    # Those that are kept, the best, and one that is there before another is deleted.
    at_once = saves if options.keep_checkpoints is None else min(saves, options.keep_checkpoints + 2)
    takes = {
        f"{at_once} checkpoints": at_once * 3 * trained_bytes,  # what is trained and Adam's two moments
    }
    model_bytes = (1 if options.export_layout == NATIVE else 2) * base_bytes  # other layouts come from the native one
    if is_full_finetuning:
        takes["the complete model"] = model_bytes
    else:
        takes["adapters"] = 2 * trained_bytes  # the old one and the new one
    if options.merge_adapter_with_base and not is_full_finetuning:
        takes |= {"their copies": 4 * trained_bytes, "the merged model": model_bytes}
    needed, free = sum(takes.values()), free_bytes(output_dir)
    if needed > free:
        parts = ", ".join(f"{size / GIB:.2f} GiB for {what}" for what, size in takes.items())
        raise InputError(
            f"--output_dir {output_dir}: {free / GIB:.2f} GiB are free, and the run writes {needed / GIB:.2f} GiB "
            f"({parts}); choose another folder, save more rarely (--save_steps), or keep fewer checkpoints "
            "(--keep_checkpoints)"
        )


def seconds_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """Until the time limit of the Slurm job that this process runs in; None where there is none, or it is not told."""
    end = environment.get("SLURM_JOB_END_TIME", "")
    return float(end) - time.time() if end.isdecimal() else None
