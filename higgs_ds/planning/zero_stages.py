"""Bytes of weights, gradients and optimizer state at each ZeRO stage, as DeepSpeed 0.19.8 was seen to allocate them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from higgs_ds.planning.weights import GROUPS, NESTED_BLOCK_SIZE, Setting, Weight

FULL_PRECISION_STATE_BELOW = 4096  # elements: bitsandbytes keeps smaller states in float32


@dataclass(frozen=True)
class Plan:
    """Bytes per rank: on its device by part, and in host memory by part.

    `weights` are the frozen ones by group, `trained` adapters or other weights that are trained; `quantization` are the
    4-bit weights' scales; `gathered` are weights that ZeRO-3 holds whole for a while; `step` is taken in the optimizer
    step alone, when all that a pass takes is free.
    """

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
        """Bytes that stay from step to step, with the gradients."""
        return sum(self.weights.values()) + self.quantization + self.trained + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        in_pass = self.buckets + self.activations + self.logits + self.working + self.gathered
        return self.resident + max(in_pass, self.step)


def _partition(numel: int, ranks: int) -> int:
    return math.ceil(numel / ranks)


def frozen_bytes(setting: Setting, weights: list[Weight]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of the base by group on the device, and in host memory."""
    ranks = setting.ranks if setting.stage == 3 else 1
    device, host = dict.fromkeys(GROUPS, 0), dict[str, int]()
    for weight in weights:
        numel, element_bytes = weight.stored(setting.dtype.itemsize)
        whole = numel * element_bytes * weight.count
        if weight.group == "embeddings" and setting.options.model.offload_embeddings:
            host["embeddings"] = host.get("embeddings", 0) + whole
        else:
            device[weight.group] += _partition(numel, ranks) * element_bytes * weight.count
    if setting.offloads("param"):
        host["weights"] = sum(device.values())
        device = dict.fromkeys(GROUPS, 0)
    return device, host


def gathered_bytes(setting: Setting, weights: list[Weight]) -> int:
    """An estimate of what ZeRO-3 holds whole at once, at the turn from the forward to the backward pass.

    Small parameters stay whole; of the others, those are not let go that are used again within so many elements; and
    some more are fetched ahead.
    """
    element_bytes = setting.dtype.itemsize
    in_layer = [weight for weight in weights if weight.in_layers]
    outside = [weight for weight in weights if not weight.in_layers]
    used = [weight for weight in outside if weight.group != "embeddings"] + in_layer * setting.config.num_hidden_layers
    if not setting.options.model.offload_embeddings:
        used += [weight for weight in outside if weight.group == "embeddings"]
    persistent = reused = passed = 0
    for weight in used:  # from the last one back
        numel, stored_bytes = weight.stored(element_bytes)
        if numel <= setting.zero["stage3_param_persistence_threshold"]:
            persistent += numel * stored_bytes
        elif 2 * passed < setting.zero["stage3_max_reuse_distance"]:  # passed once on the way there, once back
            reused += numel * stored_bytes
        passed += numel
    ahead = setting.zero["stage3_prefetch_bucket_size"] * (1 if setting.options.model.load_in_4bit else element_bytes)
    everything = sum(math.prod(weight.stored(element_bytes)) for weight in used)
    return min(persistent + reused + ahead, everything)


def with_training_state(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
    """Add what is trained, gradients, optimizer state and buckets, as DeepSpeed's optimizer of this stage has them."""
    return {0: _stage0, 1: _stage1, 2: _stage2, 3: _stage3}[setting.stage](setting, known, trained)


def _stage0(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
    """Each rank holds everything; in float32, what is trained is its own master."""
    element, numel = setting.dtype.itemsize, _numel(trained)
    masters = 4 * numel if element < 4 else 0
    return replace(
        known,
        trained=element * numel,
        gradients=element * numel,
        optimizer=masters + sum(_state_bytes(setting, weight.numel) * weight.count for weight in trained),
        buckets=element * numel if setting.ranks > 1 else 0,
        step=masters + 4 * numel,
    )


def _stage1(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
    """Optimizer state in equal parts of one flat buffer; each rank holds all gradients until the step."""
    element, accumulated, numel = setting.dtype.itemsize, setting.accumulation_bytes, _numel(trained)
    flat = _flat_numel(numel, setting.ranks)
    mine = flat // setting.ranks
    state = replace(
        known, trained=flat * element, gradients=numel * accumulated, buckets=_buckets(setting, accumulated)
    )
    if setting.offloads("optimizer"):
        return _with_offloaded_state(setting, state, trained, mine)
    if (element, accumulated) == (2, 4):
        # DeepSpeed's BF16_Optimizer: float32 gradients beside those of the backward pass, summed without buckets.
        state = replace(
            state,
            gradients=flat * accumulated + numel * element,
            buckets=numel * accumulated if setting.ranks > 1 else 0,
        )
    return replace(state, optimizer=4 * mine + _state_bytes(setting, mine), step=4 * mine)


def _stage2(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
    """Optimizer state and gradients in equal parts of one flat buffer."""
    element, flat = setting.dtype.itemsize, _flat_numel(_numel(trained), setting.ranks)
    mine = flat // setting.ranks
    state = replace(
        known, trained=flat * element, gradients=mine * setting.accumulation_bytes, buckets=_buckets(setting, element)
    )
    if setting.offloads("optimizer"):
        return _with_offloaded_state(setting, replace(state, gradients=mine * element), trained, mine)
    return replace(state, optimizer=4 * mine + _state_bytes(setting, mine), step=4 * mine)


def _stage3(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
    """Everything in equal parts, each parameter by itself; one bucket, always there."""
    element, accumulated = setting.dtype.itemsize, setting.accumulation_bytes
    mine = sum(_partition(weight.numel, setting.ranks) * weight.count for weight in trained)
    state = replace(known, trained=mine * element, buckets=_buckets(setting, element, always_one=True))
    optimizer = 4 * mine + _state_bytes(setting, mine)
    if not setting.offloads("optimizer"):
        # Stepped group by group: gradients in float32, and what Adam takes for itself.
        at_once = min(mine, int(setting.zero["sub_group_size"]))
        return replace(state, gradients=mine * accumulated, optimizer=optimizer, step=8 * at_once)
    host = known.host | {"optimizer": optimizer, "gradients": (4 + accumulated) * mine}
    if setting.offloads("param"):
        host["weights that are trained"] = state.trained
        state = replace(state, trained=0)
    return replace(state, host=host)


def _with_offloaded_state(setting: Setting, state: Plan, trained: list[Weight], mine: int) -> Plan:
    """Move the optimizer of stage 1 or 2 to the host, with float32 gradients and a copy of what this rank trains."""
    element = setting.dtype.itemsize
    staging = max(weight.numel for weight in trained) * element  # once on the device, once on the host
    host = state.host | {
        "optimizer": 4 * mine + _state_bytes(setting, mine),
        "gradients": (4 + element) * mine,
        "copy of what is trained": element * mine + staging,
    }
    return replace(state, buckets=state.buckets + staging, host=host)


def _numel(trained: list[Weight]) -> int:
    return sum(weight.numel * weight.count for weight in trained)


def _flat_numel(numel: int, ranks: int) -> int:
    """Elements of a flat buffer, padded so that each rank's part begins at four bytes."""
    return math.ceil(numel / (2 * ranks)) * 2 * ranks


def _buckets(setting: Setting, element_bytes: int, always_one: bool = False) -> int:
    """What gradients are copied into to be summed over ranks; allocated in full, however few they are."""
    if not setting.zero.get("contiguous_gradients", True) and not setting.offloads("optimizer"):
        return 0
    copies = 2 if setting.zero.get("overlap_comm") and not always_one else 1
    return copies * int(setting.zero["reduce_bucket_size"]) * element_bytes


def _state_bytes(setting: Setting, numel: int) -> int:
    """Adam's two moments of a tensor of `numel` elements."""
    if not setting.options.optim.optim.endswith("8bit") or numel < FULL_PRECISION_STATE_BELOW:
        return 8 * numel
    return 2 * (numel + 4 * math.ceil(numel / NESTED_BLOCK_SIZE))
