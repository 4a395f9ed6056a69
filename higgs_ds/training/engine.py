"""An engine of DeepSpeed: start it, run an optimizer step, evaluate, gather and restore the trained state.

The float32 master weights of the trained parameters and Adam's moments leave and enter this module as whole tensors by
name. A checkpoint therefore does not depend on the ZeRO stage or the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
from torch import nn

from higgs_ds.common.distributed import device, rank, sum_over_ranks, world_size
from higgs_ds.data.collate import Batch
from higgs_ds.model.dropout import generator_state, set_generator_state
from higgs_ds.model.loss import LossWeights, StepResult, Totals
from higgs_ds.model.parts import NO_PARTS, Parts
from higgs_ds.options.ds_config import fit_buckets
from higgs_ds.options.optim import OptimOptions
from higgs_ds.training.averages import exchange_averages, start_average, update_averages
from higgs_ds.training.deepspeed_start import disable_compiled_collectives, partition_over_ranks, quiet_deepspeed
from higgs_ds.training.learning_rates import current_rates, make_schedule, parameter_groups
from higgs_ds.training.loss_scaling import LossScaling
from higgs_ds.training.objectives import Objective, Supervised
from higgs_ds.training.optimizers import make_optimizer, start_moments
from higgs_ds.training.sharded_state import ShardedState

BatchT = TypeVar("BatchT", bound=Batch)


class Engine:
    """A DeepSpeed engine around a model whose forward returns (losses, sums, hits), as a `LossModel`."""

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        settings: dict[str, Any],
        options: OptimOptions,
        total_steps: int,
        weights: LossWeights,
        warmup_steps: int | None = None,
        full_parts: Parts = NO_PARTS,
        objective: Objective | None = None,
    ) -> None:
        """Start DeepSpeed around `model`.

        Args:
            trained: the parameters to train, by the names under which they are gathered.
            settings: the DeepSpeed configuration, without any "auto".
            warmup_steps: by default, --warmup_ratio of `total_steps`.
            full_parts: optional parts of the model that are among the parameters to train.
            objective: by default, that all targets are learned with these `weights`.
        """
        self.trained = trained
        self.weights = weights
        self.objective: Objective = objective or Supervised(weights)
        self.lr, self.ema_decay = options.lr, options.ema_decay
        self.applied_steps = 0
        self.device = device()
        quiet_deepspeed()
        disable_compiled_collectives()
        optimizer = make_optimizer(options, parameter_groups(options, trained, full_parts))
        self.scheduler = make_schedule(options, optimizer, total_steps, warmup_steps)
        settings = fit_buckets(settings, sum(parameter.numel() for parameter in trained.values()), world_size())
        if settings["zero_optimization"]["stage"] == 3:
            partition_over_ranks(model, settings, self.device)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self.scheduler, config=settings, dist_init_required=False
        )
        self.stage = self.engine.zero_optimization_stage()
        self._stage0_grad_norm = torch.zeros(())  # DeepSpeed does not keep the norm at stage 0
        self.state = ShardedState(self.engine, self.device)
        if self.state.is_stage0_wrapper:
            self.state.undo_step_at_start(self.trained.values())
        self.scaling = LossScaling(self.engine.optimizer, settings["fp16"]) if "fp16" in settings else None
        if self.keeps_average:
            self._start_state()

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Run forward and backward over this rank's micro-batches of a window, then one optimizer step.

        In fp16, a window is run again at a lower loss scale, with the same dropout, if its losses are finite, but the
        gradients overflow.
        """
        self.engine.train()
        sizes = sum_over_ranks(
            torch.stack([self.objective.sizes(batch) for batch in batches]).sum(dim=0).to(self.device)
        )
        counts = sizes[: 1 + len(self.weights.codebooks)]
        generator = generator_state(self.device)
        sums, hits, measures, applied = self._run_window(batches, sizes)
        overflows, at_minimum = 0, False
        while not (applied or self.scaling is None or sum_over_ranks((~sums.isfinite()).sum())):
            overflows, at_minimum = overflows + 1, self.scaling.is_at_minimum
            if at_minimum:
                break
            self.scaling.update(overflowed=True)
            set_generator_state(generator, self.device)
            sums, hits, measures, applied = self._run_window(batches, sizes)
        if applied:
            self.applied_steps += 1
            self._update_averages()
        else:
            self.scheduler.step()  # as the engine does after every step that it applies
        if applied and self.scaling is not None:
            self._stage0_grad_norm = torch.as_tensor(self.engine.get_global_grad_norm() / self.scaling.scale)
            self.scaling.update(overflowed=False)
        return StepResult(sums, counts, hits, measures, applied, overflows, at_minimum)

    def _run_window(
        self, batches: Sequence[Batch], sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """Return this rank's sums, hits and measures as in `StepResult`, and whether a step was applied."""
        sums, hits, measures = [], [], []
        per_target = self.objective.target_weights(sizes)
        skipped_before, applied = self.engine.skipped_steps, True
        # At stage 0, DeepSpeed 0.19.8 divides the gradients by the loss scale, but does not multiply the loss by it.
        scale = self.scaling.scale if self.scaling is not None and self.stage == 0 else 1.0
        for i, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            losses, micro_sums, micro_hits = self.engine(**batch.tensors(self.device), target_weights=per_target)
            loss, measured = self.objective.loss(losses, batch, sizes)
            # Every target, or pair, weighs 1 / count, with the count of the whole window. DeepSpeed averages gradients
            # over ranks, so the loss is multiplied by the number of ranks; over micro-batches, scale_wrt_gas=False
            # makes it sum. A shorter window, or a rank without targets, therefore changes no target's weight.
            # The product is also a new tensor: at stage 0, DeepSpeed 0.19.8 divides the gradient of the tensor that
            # the model returned by the accumulation steps, despite scale_wrt_gas=False.
            # A loss that is not finite makes the gradient not finite on every rank, and no rank has to wait for it.
            finite = torch.where(micro_sums.isfinite().all(), scale, torch.nan)
            self.engine.backward(loss * (world_size() * finite), scale_wrt_gas=False)
            if self.stage == 0 and i == len(batches) - 1:
                applied = self._check_gradients()
            if applied:
                self.engine.step()
            sums.append(micro_sums)
            hits.append(micro_hits)
            measures.append(measured)
        # DeepSpeed skips a step with such a gradient, and only counts it. With an offloaded optimizer, version 0.19.8
        # would then add the next gradients to these.
        applied &= self.engine.skipped_steps == skipped_before
        if not applied:
            gradients = getattr(self.engine.optimizer, "averaged_gradients", {})
            gradients.update(dict.fromkeys(gradients))
        return torch.stack(sums), torch.stack(hits).sum(0), torch.stack(measures).sum(0), applied

    def _check_gradients(self) -> bool:
        """At stage 0, store the gradient norm; return whether it is finite, which DeepSpeed ignores in float32."""
        if self.scaling is not None:
            return True  # DeepSpeed checks, and has the norm in float32
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        self._stage0_grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.state.is_stage0_wrapper or self._stage0_grad_norm.isfinite():
            return True
        for parameter in self.trained.values():
            parameter.grad = None
        return False

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Totals:
        """Return the totals of all ranks' batches."""
        num_parts = 1 + len(self.weights.codebooks)
        sizes = (num_parts, num_parts, num_parts + 2, self.objective.num_measures)
        totals = Totals(*(torch.zeros(size, dtype=torch.float64, device=self.device) for size in sizes))
        for batch, losses, sums, hits in self._forward_passes(batches):
            _, measures = self.objective.loss(losses, batch, torch.ones_like(self.objective.sizes(batch)))
            totals = totals.plus(Totals(sums, batch.target_counts().to(self.device), hits, measures))
        return Totals(*map(sum_over_ranks, totals))

    @torch.no_grad()
    def losses_of(self, batches: Iterable[BatchT]) -> Iterator[tuple[BatchT, torch.Tensor]]:
        """Yield each batch with the losses of its targets, without dropout, as the objective weights them."""
        for batch, losses, *_ in self._forward_passes(batches):
            yield batch, losses

    def _forward_passes(
        self, batches: Iterable[BatchT]
    ) -> Iterator[tuple[BatchT, torch.Tensor, torch.Tensor, torch.Tensor]]:
        self.engine.eval()
        per_target = self.objective.target_weights(torch.ones(1 + len(self.weights.codebooks), device=self.device))
        for batch in batches:
            yield batch, *self.engine(**batch.tensors(self.device), target_weights=per_target)

    @property
    def keeps_average(self) -> bool:
        """Whether there is an average of the trained weights over the steps, which `gather` yields as AVERAGE."""
        return self.ema_decay is not None

    @torch.no_grad()
    def _update_averages(self) -> None:
        if self.ema_decay is not None:
            update_averages(self.state.optimizer, self.state.masters(), self.ema_decay, self.applied_steps)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block, the model computes with the averaged weights. Every rank must enter it, between steps."""
        self._exchange_weights()
        yield
        self._exchange_weights()  # not if an error ends the run: other ranks may not come here

    @torch.no_grad()
    def _exchange_weights(self) -> None:
        """Exchange master weights and averages, and copy the masters into the model, as after an optimizer step."""
        exchange_averages(self.state.optimizer, self.state.masters())
        self.state.copy_masters_into_model(self.trained.values())

    @contextlib.contextmanager
    def generation_mode(self, folder: Path) -> Iterator[nn.Module]:
        """Yield the model for transformers' generation, for one block: on this rank alone, at stage 3 on all ranks."""
        with self.engine.module.generation_mode(folder) as model:
            yield model

    @property
    def learning_rates(self) -> dict[str, float]:
        """The learning rates of the next step, by their names in the log: `lr`, and those of groups with another."""
        return current_rates(self.scheduler, self.lr)

    def restore_schedule(self, state: dict[str, Any]) -> None:
        """Restore the position in the learning rate schedule, which may have more steps now, from its `state_dict`."""
        self.scheduler.load_state_dict(state)
        schedules = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        self.scheduler._last_lr = [lr * factor(self.scheduler.last_epoch) for lr, factor in schedules]
        for group, lr in zip(self.state.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradients over all ranks, before clipping."""
        return float(self._stage0_grad_norm if self.stage == 0 else self.engine.get_global_grad_norm())

    @property
    def master_bytes(self) -> dict[str, int]:
        """Size in bytes of each float32 master weight, and of each of its Adam moments, in the order of `gather`."""
        return {name: 4 * getattr(p, "ds_numel", p.numel()) for name, p in self.trained.items()}

    @torch.no_grad()
    def gather(self, *moments: str | None) -> Iterator[torch.Tensor]:
        """Yield float32 master weights (None), Adam's moments or AVERAGE (by name), one whole tensor after another.

        Every rank must iterate to the end. The tensors are on the CPU of rank 0, and empty on the other ranks.
        """
        for moment in moments:
            with self.state.float_moments() if moment else contextlib.nullcontext():
                for parameter in self.trained.values():
                    whole = self.state.gather(parameter, moment)
                    yield whole.detach().float().cpu() if rank() == 0 else torch.empty(0)

    @torch.no_grad()
    def restore(
        self, masters: Mapping[str, torch.Tensor], moments: Mapping[str, Mapping[str, torch.Tensor]], step: int
    ) -> None:
        """Restore, on every rank, the whole tensors that `gather` returned, by parameter name, after `step` steps.

        The model's own lower-precision copies must already hold the same values.
        """
        self.applied_steps = step
        self._start_state()
        self.set_masters(masters)
        with self.state.float_moments():
            for name, parameter in self.trained.items():
                for moment, tensors in moments.items():
                    self.state.set(parameter, tensors[name], moment)

    def _start_state(self) -> None:
        """Create the optimizer state that the first step would create, and averages of the current weights."""
        for flat in self.state.masters():
            start_moments(self.state.optimizer, flat, self.applied_steps)
        self._start_averages()

    def _start_averages(self) -> None:
        if self.keeps_average:
            for flat in self.state.masters():
                start_average(self.state.optimizer, flat)

    @torch.no_grad()
    def set_masters(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Set, on every rank, the float32 master weights of which the model's own copies already hold the values.

        Averages begin with these values.
        """
        for name, parameter in self.trained.items():
            self.state.set(parameter, masters[name], None)
        self._start_averages()
