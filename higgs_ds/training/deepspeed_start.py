"""What DeepSpeed needs before an engine starts: a partitioned model, less output, nothing to compile."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from deepspeed.runtime import bf16_optimizer
from torch import nn

from higgs_ds.model.nf4 import move_statistics


def partition_over_ranks(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Move a model to its device and partition it over the ranks, one parameter at a time.

    `deepspeed.initialize` would first put the whole model on every GPU, which stage 3 is chosen to avoid. Every rank
    must hold the same values: DeepSpeed broadcasts rank 0's only if it moves the model itself.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    move_statistics(model, device)


def quiet_deepspeed() -> None:
    """Silence DeepSpeed's configuration (level INFO) and the memory lines of its bf16 optimizer, but not warnings."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def disable_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared memory collectives, which CPU ranks do not need.

    Compiling needs g++ and ninja, takes half a minute the first time, and raises an error if they are missing.
    """
    # DeepSpeed fills this table on first access, by probing every one of its operators.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
