"""The float32 master weights and the optimizer's state inside an engine of DeepSpeed 0.19.8, at each ZeRO stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from higgs_ds.common.distributed import rank, world_size
from higgs_ds.training.optimizers import float_moments


class ShardedState:
    """What an engine trains, as tensors of this rank (`masters`) or as whole ones of each parameter (`gather`)."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.stage = engine.zero_optimization_stage()
        self.device = device
        self._wrapper = engine.optimizer

    @property
    def is_stage0_wrapper(self) -> bool:
        """Whether it is stage 0 in bf16 or fp16, whose wrapper keeps masters; in float32, nothing is wrapped."""
        return isinstance(self._wrapper, FP16_UnfusedOptimizer)

    @torch.no_grad()
    def undo_step_at_start(self, trained: Iterable[nn.Parameter]) -> None:
        """Undo the step on zero gradients with which DeepSpeed's stage 0 wrapper allocates Adam's state.

        That step counts in Adam's bias correction (the first real step would be 0.74 times as large as it should be),
        and it decays the weights once.
        """
        self.optimizer.state.clear()
        for parameter in trained:
            self.master_of(parameter).copy_(parameter)

    @contextlib.contextmanager
    def float_moments(self) -> Iterator[None]:
        """Within the block, DeepSpeed finds Adam's moments under torch's names, in float32."""
        with float_moments(self.optimizer, self.masters()):
            self._link_state()
            yield
        self._link_state()

    def _link_state(self) -> None:
        """Make DeepSpeed use the current optimizer state: its views of an older state are stale, and hold memory."""
        if self.stage in (1, 2):
            self._wrapper._hp_optimizer_states_linked = False
            self._wrapper._lazy_init_hp_params_optimizer_state()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer inside DeepSpeed's wrapper; stage 0 in float32 has no wrapper."""
        return getattr(self._wrapper, "optimizer", self._wrapper)

    def masters(self) -> list[torch.Tensor]:
        """Return this rank's float32 masters, by which the optimizer finds their state: flat partitions, or weights."""
        if self.stage == 3:
            return list(self._wrapper.fp32_partitioned_groups_flat)
        return [master for group in self.optimizer.param_groups for master in group["params"]]

    def gather(self, parameter: Any, moment: str | None) -> torch.Tensor:
        """Return a parameter's whole master weight (None), or a tensor of its state. Every rank must call this."""
        if self.stage == 3:
            part = (
                safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
            ).to(self.device)
            parts = part.new_empty(world_size() * part.numel())
            dist.all_gather_into_tensor(parts, part.contiguous())
            return parts[: parameter.ds_numel].view(parameter.ds_shape)
        if self.stage in (1, 2):
            return safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)
        master = self.master_of(parameter)
        return self.optimizer.state[master][moment] if moment else master

    def set(self, parameter: Any, value: torch.Tensor, moment: str | None) -> None:
        """Set what `gather` returns, from the same whole tensor on every rank."""
        if self.stage == 3:
            # Each rank holds a part of equal size; the last parts are padded if the parameter does not divide evenly.
            part = parameter.ds_tensor.ds_numel
            padded = torch.nn.functional.pad(value.flatten(), (0, part * world_size() - value.numel()))
            mine = padded[rank() * part : (rank() + 1) * part]
            if moment:
                safe_set_local_optimizer_state(parameter, mine, moment)
            else:
                safe_set_local_fp32_param(parameter, mine)
        elif self.stage in (1, 2):
            if moment:
                safe_set_full_optimizer_state(parameter, value, moment)
            else:
                safe_set_full_fp32_param(parameter, value)
        else:
            master = self.master_of(parameter)
            (self.optimizer.state[master][moment] if moment else master.data).copy_(value)

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's float32 master weight at stage 0; in float32 training, this is the parameter itself."""
        wrapper = self._wrapper
        if not self.is_stage0_wrapper:
            return parameter
        low = [p for group in wrapper.fp16_groups for p in group]
        masters = [p for group in wrapper.fp32_groups for p in group]
        return next(master for p, master in zip(low, masters, strict=True) if p is parameter)

    def copy_masters_into_model(self, trained: Iterable[nn.Parameter]) -> None:
        """Copy the master weights into the model, as an optimizer step does. Every rank must call this."""
        wrapper = self._wrapper
        if self.stage == 3:
            wrapper._partition_all_parameters()
            for sub_group in range(len(wrapper.fp16_groups)):
                wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
            if wrapper.persistent_parameters:
                wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        elif self.stage in (1, 2):
            wrapper.update_lp_params()
        elif self.is_stage0_wrapper:
            for parameter in trained:
                parameter.copy_(self.master_of(parameter))
