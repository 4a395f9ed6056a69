"""Bytes of weights, gradients and optimizer state at each ZeRO stage, as observed in DeepSpeed 0.19.8."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from higgs_ds.options.ds_config import fit_buckets
from higgs_ds.planning.weights import GROUPS, NESTED_BLOCK_SIZE, Setting, Weight

FULL_PRECISION_STATE_BELOW = 4096  # elements: bitsandbytes keeps smaller states in float32


@dataclass(frozen=True)
class Plan:
    """Planned bytes per rank by part, on its device and in host memory.

    shape: of the micro-batch, samples and positions of each.
    weights: frozen weights by group.
    quantization: scales of 4-bit weights.
    trained: adapters or other trained weights.
    gathered: weights that ZeRO-3 temporarily holds unpartitioned.
    step: needed only in the optimizer step, when the memory of the pass is free again.
    host: bytes in host memory by part.
    """

    shape: tuple[int, int]
    weights: dict[str, int]
    quantization: int
    trained: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    logits: int
    working: int
    gathered: int
    step: int
    host: dict[str, int]

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between steps, including the gradients."""
        return sum(self.weights.values()) + self.quantization + self.trained + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        in_pass = self.buckets + self.activations + self.logits + self.working + self.gathered
        return self.resident + max(in_pass, self.step)


def _partition(numel: int, ranks: int) -> int:
    return math.ceil(numel / ranks)


def frozen_bytes(setting: Setting, weights: list[Weight]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the bytes of the frozen weights by group on the device, and in host memory."""
    ranks = setting.ranks if setting.stage == 3 else 1
    device, host = dict.fromkeys(GROUPS, 0), dict[str, int]()
    for weight in weights:
        numel, element_bytes = weight.stored(setting.dtype.itemsize)
        total = numel * element_bytes * weight.count
        if weight.group == "embeddings" and setting.options.model.offload_embeddings:
            host["embeddings"] = host.get("embeddings", 0) + total
        else:
            device[weight.group] += _partition(numel, ranks) * element_bytes * weight.count
    if setting.offloads("param"):
        host["weights"] = sum(device.values())
        device = dict.fromkeys(GROUPS, 0)
    return device, host


def gathered_bytes(setting: Setting, weights: list[Weight]) -> int:
    """Estimate the bytes that ZeRO-3 holds unpartitioned between the forward and the backward pass.

    Small parameters stay gathered. Of the others, ZeRO-3 keeps those that are used again within
    `stage3_max_reuse_distance` elements, and prefetches some more.
    """
    element_bytes = setting.dtype.itemsize
    in_layer = [weight for weight in weights if weight.in_layers]
    outside = [weight for weight in weights if not weight.in_layers]
    used = [weight for weight in outside if weight.group != "embeddings"] + in_layer * setting.config.num_hidden_layers
    if not setting.options.model.offload_embeddings:
        used += [weight for weight in outside if weight.group == "embeddings"]
    persistent = reused = passed = 0
    for weight in used:  # from the last weight backwards
        numel, stored_bytes = weight.stored(element_bytes)
        if numel <= setting.zero["stage3_param_persistence_threshold"]:
            persistent += numel * stored_bytes
        elif 2 * passed < setting.zero["stage3_max_reuse_distance"]:  # in the forward and in the backward pass
            reused += numel * stored_bytes
        passed += numel
    prefetched = setting.zero["stage3_prefetch_bucket_size"] * (
        1 if setting.options.model.load_in_4bit else element_bytes
    )
    all_used = sum(math.prod(weight.stored(element_bytes)) for weight in used)
    return min(persistent + reused + prefetched, all_used)


def with_training_state(setting: Setting, partial_plan: Plan, trained: list[Weight]) -> Plan:
    """Add trained weights, gradients, optimizer state and buckets, as DeepSpeed's optimizer of the stage holds them."""
    fitted = replace(setting, ds_settings=fit_buckets(setting.ds_settings, _numel(trained), setting.ranks))
    return {0: _stage0, 1: _stage1, 2: _stage2, 3: _stage3}[setting.stage](fitted, partial_plan, trained)


def _stage0(setting: Setting, partial_plan: Plan, trained: list[Weight]) -> Plan:
    """Each rank holds everything. Trained float32 weights need no separate masters."""
    element, numel = setting.dtype.itemsize, _numel(trained)
    masters = 4 * numel if element < 4 else 0
    return replace(
        partial_plan,
        trained=element * numel,
        gradients=element * numel,
        optimizer=masters + sum(_state_bytes(setting, weight.numel) * weight.count for weight in trained),
        buckets=element * numel if setting.ranks > 1 else 0,
        step=masters + 4 * numel,
    )


def _stage1(setting: Setting, partial_plan: Plan, trained: list[Weight]) -> Plan:
    """Optimizer state is partitioned in one flat buffer; each rank holds all gradients until the step."""
    element, accumulated, numel = setting.dtype.itemsize, setting.accumulation_bytes, _numel(trained)
    flat = _flat_numel(numel, setting.ranks)
    rank_numel = flat // setting.ranks
    state = replace(
        partial_plan, trained=flat * element, gradients=numel * accumulated, buckets=_buckets(setting, accumulated)
    )
    if setting.offloads("optimizer"):
        return _with_offloaded_state(setting, state, trained, rank_numel)
    if setting.dtype == torch.bfloat16 and accumulated == 4:
        # DeepSpeed's BF16_Optimizer has float32 gradients in addition to those of the backward pass, and sums them
        # without buckets.
        state = replace(
            state,
            gradients=flat * accumulated + numel * element,
            buckets=numel * accumulated if setting.ranks > 1 else 0,
        )
    elif element < accumulated:
        # In fp16, the gradients of the last backward pass are kept beside the float32 sums.
        state = replace(state, gradients=numel * (accumulated + element))
    return replace(state, optimizer=4 * rank_numel + _state_bytes(setting, rank_numel), step=4 * rank_numel)


def _stage2(setting: Setting, partial_plan: Plan, trained: list[Weight]) -> Plan:
    """Optimizer state and gradients are partitioned in one flat buffer."""
    element, flat = setting.dtype.itemsize, _flat_numel(_numel(trained), setting.ranks)
    rank_numel = flat // setting.ranks
    state = replace(
        partial_plan,
        trained=flat * element,
        gradients=rank_numel * setting.accumulation_bytes,
        buckets=_buckets(setting, element),
    )
    if setting.offloads("optimizer"):
        return _with_offloaded_state(setting, replace(state, gradients=rank_numel * element), trained, rank_numel)
    return replace(state, optimizer=4 * rank_numel + _state_bytes(setting, rank_numel), step=4 * rank_numel)


def _stage3(setting: Setting, partial_plan: Plan, trained: list[Weight]) -> Plan:
    """Everything is partitioned, parameter by parameter. There is always one bucket."""
    element, accumulated = setting.dtype.itemsize, setting.accumulation_bytes
    rank_numel = sum(_partition(weight.numel, setting.ranks) * weight.count for weight in trained)
    state = replace(partial_plan, trained=rank_numel * element, buckets=_buckets(setting, element, always_one=True))
    optimizer = 4 * rank_numel + _state_bytes(setting, rank_numel)
    if not setting.offloads("optimizer"):
        # The step runs group by group, with float32 gradients and Adam's temporary memory.
        at_once = min(rank_numel, int(setting.zero["sub_group_size"]))
        return replace(state, gradients=rank_numel * accumulated, optimizer=optimizer, step=8 * at_once)
    host = partial_plan.host | {"optimizer": optimizer, "gradients": (4 + accumulated) * rank_numel}
    if setting.offloads("param"):
        host["trained weights"] = state.trained
        state = replace(state, trained=0)
    return replace(state, host=host)


def _with_offloaded_state(setting: Setting, state: Plan, trained: list[Weight], rank_numel: int) -> Plan:
    """Move the optimizer of stage 1 or 2 to the host, with float32 gradients and a copy of this rank's weights."""
    element = setting.dtype.itemsize
    staging = max(weight.numel for weight in trained) * element  # allocated on the device and on the host
    host = state.host | {
        "optimizer": 4 * rank_numel + _state_bytes(setting, rank_numel),
        "gradients": (4 + element) * rank_numel,
        "copy of trained weights": element * rank_numel + staging,
    }
    return replace(state, buckets=state.buckets + staging, host=host)


def _numel(trained: list[Weight]) -> int:
    return sum(weight.numel * weight.count for weight in trained)


def _flat_numel(numel: int, ranks: int) -> int:
    """Return the elements of a flat buffer, padded so that each rank's partition is aligned to four bytes."""
    return math.ceil(numel / (2 * ranks)) * 2 * ranks


def _buckets(setting: Setting, element_bytes: int, always_one: bool = False) -> int:
    """Bytes of the buffers in which gradients are summed over ranks. DeepSpeed always allocates them at full size."""
    if not setting.zero.get("contiguous_gradients", True) and not setting.offloads("optimizer"):
        return 0
    copies = 2 if setting.zero.get("overlap_comm") and not always_one else 1
    return copies * int(setting.zero["reduce_bucket_size"]) * element_bytes


def _state_bytes(setting: Setting, numel: int) -> int:
    """Bytes of Adam's two moments, and of the float32 average if there is one, for a tensor of `numel` elements."""
    average = 0 if setting.options.optim.ema_decay is None else 4 * numel
    if not setting.options.optim.optim.endswith("8bit") or numel < FULL_PRECISION_STATE_BELOW:
        return 8 * numel + average
    return 2 * (numel + 4 * math.ceil(numel / NESTED_BLOCK_SIZE)) + average
