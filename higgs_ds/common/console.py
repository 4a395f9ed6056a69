"""Console output of a command: lines printed by rank 0, and library messages that are switched off."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from higgs_ds.common.distributed import is_main


def quiet_libraries() -> None:
    """Switch off library messages that do not concern the user, without importing a library. Call before any import."""
    # On CPUs with bf16 instructions, bitsandbytes reports a missing inference kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed, which transformers imports, warns about every machine without a GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_wanted)
    # bitsandbytes, which PEFT imports, would load torch's compiler for some functions: a second, and other results on
    # machines that have a C++ compiler.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # PEFT 0.21 uses the former name of a property of transformers 5.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # transformers 5.23 renamed this as well; older versions have only this name.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
    # DeepSpeed 0.19 and this project call these by the names that torch 2.11 has; torch 2.14 has others for them.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f"`torch.distributed.{name}` is deprecated", FutureWarning)


def _is_wanted(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


_quiet = False


def set_quiet(quiet: bool) -> None:
    """Choose whether `say` and the progress bars are silent in this process."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Return whether `say` and the progress bars are silent."""
    return _quiet


def say(text: str) -> None:
    """Print a line on rank 0, above any progress bar. Print nothing with --quiet."""
    if not _quiet:
        warn(text)


def warn(text: str) -> None:
    """Print a line on rank 0, also with --quiet."""
    if is_main():
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()  # output to a file is buffered otherwise
