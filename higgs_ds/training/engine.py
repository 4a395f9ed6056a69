"""The only user of DeepSpeed: start an engine, run one optimizer step, gather what is trained, put it back.

Float32 masters of what is trained and Adam's moments leave and enter here as whole tensors by name, so that what is on
disk knows nothing of ZeRO stages or the number of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
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
from transformers import get_scheduler

from higgs_ds.common.distributed import device, rank, sum_over_ranks, world_size
from higgs_ds.common.run_files import MOMENTS
from higgs_ds.data.collate import Batch
from higgs_ds.model.loss import LossWeights, StepResult, target_weights
from higgs_ds.model.nf4 import move_statistics
from higgs_ds.options.train import OptimOptions
from higgs_ds.training.optimizers import float_moments, make_optimizer, start_moments


class Engine:
    """A DeepSpeed engine around a model whose forward returns (loss, sums)."""

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        settings: dict[str, Any],
        options: OptimOptions,
        total_steps: int,
        weights: LossWeights,
    ) -> None:
        """Start DeepSpeed around `model`.

        Args:
            trained: the parameters to train, by the names under which they are gathered.
            settings: DeepSpeed's, without any "auto".
        """
        self.trained = trained
        self.weights = weights
        self.device = device()
        _quiet_deepspeed()
        _disable_compiled_collectives()
        optimizer = make_optimizer(options, trained.values())
        self.scheduler = make_schedule(options, optimizer, total_steps)
        if settings["zero_optimization"]["stage"] == 3:
            _partition_over_ranks(model, settings, self.device)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self.scheduler, config=settings, dist_init_required=False
        )
        self.stage = self.engine.zero_optimization_stage()
        self._stage0_grad_norm = torch.zeros(())  # DeepSpeed keeps none there
        if isinstance(self.engine.optimizer, FP16_UnfusedOptimizer):
            self._undo_step_at_start()

    @torch.no_grad()
    def _undo_step_at_start(self) -> None:
        """Forget the step on zero gradients with which DeepSpeed's stage 0 wrapper allocates Adam's state.

        It counts in Adam's bias correction (the first true step is 0.74 times as large as it should be) and decays the
        weights once.
        """
        self._inner.state.clear()
        for parameter in self.trained.values():
            self._master_of(parameter).copy_(parameter)

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches of a window, then one optimizer step."""
        self.engine.train()
        counts = sum_over_ranks(torch.stack([batch.target_counts() for batch in batches]).sum(dim=0).to(self.device))
        per_target = target_weights(counts, self.weights)
        sums, hits = [], []
        skipped_before, taken = self.engine.skipped_steps, True
        for i, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            loss, micro_sums, micro_hits = self.engine(**batch.tensors(self.device), target_weights=per_target)
            # Every target weighs 1 / count of the whole window. DeepSpeed averages gradients over ranks, so that the
            # loss is multiplied by their number; over micro-batches it is told to sum. A window cut short, or a rank
            # without targets, therefore changes no target's weight.
            # The product is also a tensor of its own: at stage 0, DeepSpeed 0.19.8 divides the gradient of the very
            # tensor that the model returned by the accumulation steps, in spite of scale_wrt_gas=False.
            # A loss that is not finite becomes a gradient that is not, on every rank, without anyone waiting for it.
            finite = torch.where(micro_sums.isfinite().all(), 1.0, torch.nan)
            self.engine.backward(loss * (world_size() * finite), scale_wrt_gas=False)
            if self.stage == 0 and i == len(batches) - 1:
                taken = self._check_gradients()
            if taken:
                self.engine.step()
            sums.append(micro_sums)
            hits.append(micro_hits)
        # DeepSpeed passes over such a gradient, and only counts it.
        taken &= self.engine.skipped_steps == skipped_before
        if not taken:
            self.scheduler.step()  # as the engine does behind every other step
        return StepResult(torch.stack(sums), counts, torch.stack(hits).sum(0), taken)

    def _check_gradients(self) -> bool:
        """At stage 0: their norm, and whether they are finite, which in float32 nothing else asks there."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        self._stage0_grad_norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(self.engine.optimizer, FP16_UnfusedOptimizer) or self._stage0_grad_norm.isfinite():
            return True
        for parameter in self.trained.values():
            parameter.grad = None
        return False

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss sums and target counts, float64 (1 + C,), and hits (1 + C + 2,), over the micro-batches of all ranks."""
        self.engine.eval()
        per_target = torch.ones(1 + len(self.weights.codebooks), device=self.device)
        sums = torch.zeros(len(per_target), dtype=torch.float64, device=self.device)
        counts, hits = torch.zeros_like(sums), sums.new_zeros(len(sums) + 2)
        for batch in batches:
            _, micro_sums, micro_hits = self.engine(**batch.tensors(self.device), target_weights=per_target)
            sums += micro_sums
            counts += batch.target_counts().to(self.device)
            hits += micro_hits
        return sum_over_ranks(sums), sum_over_ranks(counts), sum_over_ranks(hits)

    @contextlib.contextmanager
    def generation_mode(self, folder: Path) -> Iterator[nn.Module]:
        """For the block, the model as transformers generates with it, on this rank alone; at stage 3 on all of them."""
        with self.engine.module.generation_mode(folder) as model:
            yield model

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Put the learning rate schedule back where its `state_dict` was taken."""
        self.scheduler.load_state_dict(state)
        for group, lr in zip(self._inner.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradients over all ranks, before clipping."""
        return float(self._stage0_grad_norm if self.stage == 0 else self.engine.get_global_grad_norm())

    @property
    def master_bytes(self) -> dict[str, int]:
        """Bytes of each float32 master, or of each of Adam's moments, in the order of `gather`."""
        return {name: 4 * getattr(p, "ds_numel", p.numel()) for name, p in self.trained.items()}

    @torch.no_grad()
    def gather(self, *moments: str | None) -> Iterator[torch.Tensor]:
        """The float32 masters of what is trained (None), or Adam's moments: one whole tensor after another.

        Every rank must go through all of them. They are on the CPU of rank 0, and empty on the others.
        """
        for moment in moments:
            with self._float_moments() if moment else contextlib.nullcontext():
                for parameter in self.trained.values():
                    whole = self._gather_one(parameter, moment)
                    yield whole.detach().float().cpu() if rank() == 0 else torch.empty(0)

    @torch.no_grad()
    def restore(
        self, masters: Mapping[str, torch.Tensor], moments: Mapping[str, Mapping[str, torch.Tensor]], step: int
    ) -> None:
        """Put masters and moments, by name and whole, back where `gather` took them from, on every rank.

        The model's own, lower precision copies must hold the same values already.
        """
        for flat in self._flat_masters():
            start_moments(self._inner, flat, step)
        with self._float_moments():
            for name, parameter in self.trained.items():
                self._set_one(parameter, masters[name], None)
                for moment in MOMENTS:
                    self._set_one(parameter, moments[moment][name], moment)

    @contextlib.contextmanager
    def _float_moments(self) -> Iterator[None]:
        """While the block runs, DeepSpeed finds Adam's moments under torch's names, in float32."""
        with float_moments(self._inner, self._flat_masters()):
            self._link_state()
            yield
        self._link_state()

    def _link_state(self) -> None:
        """Have DeepSpeed see the optimizer state as it is: views of an older one are stale, and hold memory."""
        if self.stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """torch's optimizer under DeepSpeed's wrapper; stage 0 in float32 has no wrapper."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _flat_masters(self) -> list[torch.Tensor]:
        if self.stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [master for group in self._inner.param_groups for master in group["params"]]

    def _gather_one(self, parameter: Any, moment: str | None) -> torch.Tensor:
        if self.stage == 3:
            part = (
                safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
            ).to(self.device)
            parts = part.new_empty(world_size() * part.numel())
            dist.all_gather_into_tensor(parts, part.contiguous())
            return parts[: parameter.ds_numel].view(parameter.ds_shape)
        if self.stage in (1, 2):
            return safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)
        master = self._master_of(parameter)
        return self._inner.state[master][moment] if moment else master

    def _set_one(self, parameter: Any, value: torch.Tensor, moment: str | None) -> None:
        if self.stage == 3:
            # Each rank holds an equal part; the last ones are padded where the parameter does not divide.
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
            master = self._master_of(parameter)
            (self._inner.state[master][moment] if moment else master.data).copy_(value)

    def _master_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The float32 master of a parameter at stage 0, which in float32 training is the parameter itself."""
        wrapper = self.engine.optimizer
        if not isinstance(wrapper, FP16_UnfusedOptimizer):  # in spite of its name, what stage 0 wraps bf16 in
            return parameter
        low = [p for group in wrapper.fp16_groups for p in group]
        masters = [p for group in wrapper.fp32_groups for p in group]
        return next(master for p, master in zip(low, masters, strict=True) if p is parameter)


def make_schedule(options: OptimOptions, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning rate's schedule over so many optimizer steps, by transformers."""
    specific = {
        "cosine_with_restarts": {"num_cycles": options.lr_cycles},
        "warmup_stable_decay": {"num_decay_steps": math.ceil(options.lr_decay_ratio * total_steps)},
    }
    return get_scheduler(
        options.lr_scheduler_type,
        optimizer,
        num_warmup_steps=int(options.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=specific.get(options.lr_scheduler_type),
    )


def _partition_over_ranks(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Move a model to its device and over the ranks parameter by parameter.

    `deepspeed.initialize` would put all of it on every GPU first, which stage 3 is chosen to avoid. Every rank must
    hold the same values: DeepSpeed sends rank 0's around only where it moves the model itself.
    """
    deepspeed.init_distributed(auto_mpi_discovery=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    move_statistics(model, device)


def _quiet_deepspeed() -> None:
    """DeepSpeed tells its whole configuration at level INFO, and its bf16 optimizer prints memory; warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _disable_compiled_collectives() -> None:
    """Keep DeepSpeed from compiling its shared memory collectives, which CPU ranks can do without.

    It would need g++ and ninja, take half a minute the first time, and fail hard where they are missing.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
