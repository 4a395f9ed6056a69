"""Use the weights of several modules in one function. ZeRO-3 gathers a module's weights only around its call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn


class GatheringLinear(nn.Linear):
    """A linear layer that can also run a function in place of its own forward. Loaded layers change their class."""

    def forward(self, x: torch.Tensor, function: Callable[[torch.Tensor], Any] | None = None) -> Any:
        return super().forward(x) if function is None else function(x)


def with_gathered(modules: Iterable[nn.Module], function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Any:
    """Return function(x), with the weights of all modules gathered in its forward and in its backward pass.

    Under ZeRO-3, each module is called around the next, so that DeepSpeed's hooks gather and release its weights.

    Args:
        modules: linear layers whose forward takes a function, such as `GatheringLinear`.
    """
    for module in modules:
        if hasattr(module.weight, "ds_id"):  # partitioned by DeepSpeed
            function = partial(module, function=function)
    return function(x)
