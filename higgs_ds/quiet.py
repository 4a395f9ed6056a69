"""Library messages that tell a user nothing he can act on. Each is put away here, with the reason."""

from __future__ import annotations

import logging
import os
import warnings


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
