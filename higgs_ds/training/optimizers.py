"""AdamW of torch or bitsandbytes, with access to its moments as whole float32 tensors for either."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim import AdamW8bit, PagedAdamW, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer2State

from higgs_ds.common.run_files import AVERAGE, MOMENTS
from higgs_ds.options.optim import OptimOptions

_BITSANDBYTES = {"adamw_8bit": AdamW8bit, "paged_adamw": PagedAdamW, "paged_adamw_8bit": PagedAdamW8bit}
_STATE_BLOCK = 256  # values per scale in bitsandbytes' 8-bit state


def make_optimizer(options: OptimOptions, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the AdamW variant that --optim names, for parameter groups with a learning rate each."""
    kind = _BITSANDBYTES.get(options.optim, torch.optim.AdamW)
    return kind(groups, lr=options.lr, weight_decay=options.weight_decay)


def start_moments(optimizer: torch.optim.Optimizer, master: torch.Tensor, step: int) -> None:
    """Give a parameter the state that its first step would create: zero moments, with a count of `step` steps.

    bitsandbytes never frees a paged state, so that one that exists is kept.
    """
    if isinstance(optimizer, Optimizer2State):
        # The state is the same in all groups. bitsandbytes looks the parameter up in its group, and ZeRO-3 empties
        # the groups between steps.
        group = optimizer.param_groups[0]
        listed, group["params"] = group["params"], [master]
        if not optimizer.state[master]:
            optimizer.init_state(group, master, 0, 0)
        group["params"] = listed
        optimizer.state[master]["step"] = step
    else:
        zeros = {key: torch.zeros_like(master, memory_format=torch.preserve_format) for key in MOMENTS}
        optimizer.state[master] = {"step": torch.tensor(float(step)), **zeros}


@contextlib.contextmanager
def float_moments(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within the block, the state of each of `masters` holds MOMENTS in float32, whichever optimizer it is.

    If they are stored in 8 bits, values that the block changes are quantized to 8 bits again afterwards. An AVERAGE is
    in the state too, if there is one.
    """
    if not isinstance(optimizer, Optimizer2State):
        yield
        return
    stored = {master: dict(optimizer.state[master]) for master in masters}
    for master, state in stored.items():
        moments = {moment: _dequantize(state, number) for number, moment in enumerate(MOMENTS, start=1)}
        optimizer.state[master] = moments | ({AVERAGE: state[AVERAGE]} if AVERAGE in state else {})
    yield
    for master, state in stored.items():
        for number, moment in enumerate(MOMENTS, start=1):
            _store(state, number, optimizer.state[master][moment])
        optimizer.state[master] = state


def _dequantize(state: dict[str, torch.Tensor], number: int) -> torch.Tensor:
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        return codes
    scales, table = state[f"absmax{number}"], state[f"qmap{number}"]
    return dequantize_blockwise(codes, absmax=scales, code=table, blocksize=_STATE_BLOCK)


def _store(state: dict[str, torch.Tensor], number: int, value: torch.Tensor) -> None:
    codes = state[f"state{number}"]
    if codes.dtype != torch.uint8:
        codes.copy_(value)
    elif not torch.equal(_dequantize(state, number), value):  # an unchanged moment keeps its exact 8-bit state
        rounded, scales = quantize_blockwise(value, code=state[f"qmap{number}"], blocksize=_STATE_BLOCK)
        codes.copy_(rounded)
        state[f"absmax{number}"].copy_(scales.absmax)
