"""What a model keeps in host memory while it trains: embeddings, and the inputs of recomputed layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class HostModule(nn.Module):
    """A module without gradients that stays in host memory, and takes and gives tensors of any device.

    It is no submodule: nothing that walks the model moves, parts or saves its weights.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["on_host"] = module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.__dict__["on_host"](ids.cpu()).to(ids.device)


def save_on_host() -> saved_tensors_hooks:
    """While the block runs, what autograd keeps for the backward pass goes to host memory, and comes back on demand.

    Around a recomputed layer this is its input alone: what it saves within, activation checkpointing takes first. The
    copies run in order with the computation on the same stream; the host waits for none of them.
    """
    return saved_tensors_hooks(_to_host, _from_host)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, on_host.copy_(tensor, non_blocking=True)


def _from_host(kept: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, on_host = kept
    return on_host.to(device, non_blocking=True)
