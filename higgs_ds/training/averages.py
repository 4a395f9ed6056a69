"""An exponential moving average (EMA) of the trained weights, in float32, where the optimizer's state is.

It is one more tensor in the state of each master weight, beside Adam's moments: each rank averages the part that it
owns, in host memory if the optimizer is offloaded, and averages are gathered and restored as the moments are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from higgs_ds.common.run_files import AVERAGE

_AT_ONCE = 2**24  # elements that are exchanged at a time, which bounds the memory of their copy


def start_average(optimizer: torch.optim.Optimizer, master: torch.Tensor) -> None:
    """Let a master weight's average begin with its value. Its optimizer state must exist already."""
    optimizer.state[master][AVERAGE] = master.detach().clone()


def update_averages(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor], decay: float, step: int) -> None:
    """Update the averages after optimizer step number `step`, from 1: average = d average + (1 - d) weight.

    d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage, so that the first weights do
    not dominate the average of the first steps.
    """
    decay_now = min(decay, (1 + step) / (10 + step))
    for master in masters:
        optimizer.state[master][AVERAGE].lerp_(master, 1 - decay_now)


def exchange_averages(optimizer: torch.optim.Optimizer, masters: Iterable[torch.Tensor]) -> None:
    """Exchange the values of master weights and averages in place. A second call undoes the first, to the bit."""
    for master in masters:
        flat_weights, flat_averages = (tensor.view(-1) for tensor in (master, optimizer.state[master][AVERAGE]))
        for weight, average in zip(flat_weights.split(_AT_ONCE), flat_averages.split(_AT_ONCE), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
