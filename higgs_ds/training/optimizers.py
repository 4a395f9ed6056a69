"""AdamW as torch or bitsandbytes have it, and its moments as whole float32 tensors whichever it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import nn

from higgs_ds.common.run_files import MOMENTS
from higgs_ds.options.train import OptimOptions

_BITSANDBYTES = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
_STATE_BLOCK = 256  # numbers of an 8-bit state that share a scale, in bitsandbytes


def make_optimizer(options: OptimOptions, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The AdamW that --optim names."""
    kind = _BITSANDBYTES.get(options.optim, torch.optim.AdamW)
    return kind(parameters, lr=options.lr, weight_decay=options.weight_decay)


def start_moments(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int) -> None:
    """Give a parameter the state that its first step would make: moments of 0 after `step` steps."""
    if isinstance(optimizer, Optimizer2State):
        optimizer.init_state(optimizer.param_groups[0], master, 0, 0)
        optimizer.state[master]["step"] = step
    else:
        zeros = {key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS}
        optimizer.state[master] = {"step": torch.tensor(float(step)), **zeros}


@contextlib.contextmanager
def float_moments(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> Iterator[None]:
    """In the block, the state of each of `masters` holds MOMENTS in float32, whatever optimizer it is.

    Where they are in 8 bits, what the block makes of them is rounded to 8 bits again.
    """
    if not isinstance(optimizer, Optimizer2State):
        yield
        return
    kept = {master: dict(optimizer.state[master]) for master in masters}
    for master, state in kept.items():
        optimizer.state[master] = {moment: _as_float(state, number) for number, moment in enumerate(MOMENTS, start=1)}
    yield
    for master, state in kept.items():
        for number, moment in enumerate(MOMENTS, start=1):
            _take_float(state, number, optimizer.state[master][moment])
        optimizer.state[master] = state


def _as_float(state: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes
    scales, table = state[f"absmax{number}"], state[f"qmap{number}"]
    return dequantize_blockwise(codes, absmax=scales, code=table, blocksize=_STATE_BLOCK)


def _take_float(state: dict[str, torch.Tensor], number: int, value: torch.Tensor) -> None:
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        codes.copy_(value)
    elif not torch.equal(_as_float(state, number), value):  # what was only looked at stays the same to the last bit
        rounded, scales = quantize_blockwise(value, code=state[f"qmap{number}"], blocksize=_STATE_BLOCK)
        codes.copy_(rounded)
        state[f"absmax{number}"].copy_(scales.absmax)
