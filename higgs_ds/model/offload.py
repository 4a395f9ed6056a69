"""Offload to host memory during training: embeddings, and the inputs of recomputed layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


class HostModule(nn.Module):
    """A module without gradients that stays in host memory; its inputs and outputs may be on any device.

    The wrapped module is not registered as a submodule, so that nothing that iterates over the model moves, partitions
    or saves its weights.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["on_host"] = module

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.__dict__["on_host"](ids.cpu()).to(ids.device)


def save_on_host() -> saved_tensors_hooks:
    """Within the block, keep the tensors that autograd saves for the backward pass in host memory.

    Around a recomputed layer this is only its input: activation checkpointing intercepts everything saved inside. The
    copies run in order with the computation on the same stream, and the host does not wait for them.
    """
    return saved_tensors_hooks(_to_host, _from_host)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, on_host.copy_(tensor, non_blocking=True)


def _from_host(saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, on_host = saved
    return on_host.to(device, non_blocking=True)
