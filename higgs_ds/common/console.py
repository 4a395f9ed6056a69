"""What a command prints: lines on rank 0, and which library messages are switched off."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from tqdm import tqdm

from higgs_ds.common.distributed import is_main


def quiet_libraries() -> None:
    """Call this before deepspeed or transformers is imported."""
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed warns that it takes the CPU for want of a GPU, once per process, unless it is told to.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # On CPUs with bf16 instructions, bitsandbytes misses a kernel for inference that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import transformers

    # Progress bars over the tensors of a model; errors and warnings stay.
    transformers.utils.logging.disable_progress_bar()
    # PEFT 0.21 asks transformers 5 for a property under its former name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # transformers 5.23 has a new name for this too; its older versions know only this one.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)


_quiet = False


def set_quiet() -> None:
    """Have `say` print nothing, and show no progress bar, in this process."""
    global _quiet
    _quiet = True


def is_quiet() -> bool:
    """Whether `set_quiet` was called in this process."""
    return _quiet


def say(text: str) -> None:
    """Print a line on rank 0, above the progress bar where there is one; nothing with --quiet."""
    if not _quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a line on rank 0 in any case."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()  # into a file, too, where lines would wait for each other
