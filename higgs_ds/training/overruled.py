"""Options whose value is not what a run does: a DeepSpeed file, the device or few samples decide otherwise."""

from __future__ import annotations

from pathlib import Path

from higgs_ds.common.words import counted
from higgs_ds.options.train import TrainOptions


def overruled_by_file(before: TrainOptions, after: TrainOptions, ds_file: Path) -> list[str]:
    """Return one line for each option that a DeepSpeed file, or the device with "auto", has given another value."""
    old = before.flat()
    return [
        f"--{name} {old[name]}: {value}{'' if old[name] == 'auto' else f', as {ds_file.name} says'}"
        for name, value in after.flat().items()
        if value != old[name]
    ]


def overruled_by_data(options: TrainOptions, num_samples: int, total_steps: int, warmup_steps: int) -> list[str]:
    """Return one line for each option that few training samples, or few steps, leave without its effect."""
    optim, flat = options.optim, options.flat()
    found = []
    if optim.max_tokens_per_batch is None and optim.batch_size * optim.grad_accum > num_samples:
        samples = counted(num_samples, "sample")
        found.append(f"--batch_size {optim.batch_size}, --grad_accum {optim.grad_accum}: a step has {samples}: all")
    if optim.warmup_ratio > 0 and not warmup_steps:
        found.append(f"--warmup_ratio {optim.warmup_ratio:g}: no step, of {total_steps:,}")
    for name in ("log_steps", "val_steps", "sample_steps", "save_steps"):
        if isinstance(flat[name], int) and flat[name] > total_steps:
            found.append(f"--{name} {flat[name]}: at the last step only, which is {total_steps:,}")
    return found
