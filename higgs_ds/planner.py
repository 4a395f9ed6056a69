"""How much memory each part of a training takes per GPU, from a base's configuration alone.

Weights, gradients and optimizer state are arithmetic over the model's shapes, as DeepSpeed 0.19.8 was seen to allocate
them at each ZeRO stage; activations and working memory are counted by `activations`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import HiggsAudioV2Config

from higgs_ds.activations import PassSettings, measure_pass
from higgs_ds.config import TrainOptions, recompute_every
from higgs_ds.model.full import make_trainable
from higgs_ds.model.higgs import empty_model
from higgs_ds.model.nf4 import BLOCK_SIZE, is_quantized_weight
from higgs_ds.model.parts import Parts, config_of, parts_in_full

CONTEXT_BYTES = 2**29  # what a CUDA process takes before its first tensor: an assumption
AUTO_CHECKPOINTING = ("none", "4", "3", "2", "every_layer")  # from the fastest to the smallest
DEFAULT_LENGTH = 2048  # positions, where no option says how long samples may be
GROUPS = ("attention", "text FFN", "audio FFN", "norms", "embeddings", "heads", "Whisper tower")
LORA = "LoRA"
NESTED_BLOCK_SIZE = 256  # blocks of 4-bit weights whose scales share a scale; also Adam's elements in 8 bits
CODE_TABLES_BYTES = 4 * (16 + 256)
FULL_PRECISION_STATE_BELOW = 4096  # elements: bitsandbytes keeps smaller states in float32
# What a GPU's matrix library keeps for itself; between 8 and 32 MiB, an assumption.
MATRIX_WORKSPACE_BYTES = 32 * 2**20
# DeepSpeed's defaults, in elements, for files that do not say.
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class Weight:
    """One parameter, or one of each decoder layer. Adapters, and optional parts beside them, are of group LORA."""

    group: str
    numel: int
    count: int
    in_layers: bool
    four_bit: bool
    trained: bool

    def stored(self, element_bytes: int) -> tuple[int, int]:
        """Elements as they are kept, and bytes of each: packed, two weights make a byte."""
        return (math.ceil(self.numel / 2), 1) if self.four_bit else (self.numel, element_bytes)

    @property
    def statistics_bytes(self) -> int:
        """Scales of a 4-bit weight: a byte a block, a float32 for 256 of these, an offset, code tables."""
        if not self.four_bit:
            return 0
        blocks = math.ceil(self.numel / BLOCK_SIZE)
        return blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 4 + CODE_TABLES_BYTES


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


@dataclass(frozen=True)
class Setting:
    """What is planned: a base, options and DeepSpeed's settings in agreement, a number of ranks, GPUs or CPUs."""

    config: HiggsAudioV2Config
    options: TrainOptions
    ds_settings: dict[str, Any]
    ranks: int
    on_gpu: bool = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.options.model.precision == "bf16" else torch.float32

    @property
    def in_full(self) -> Parts:
        """Optional parts that are trained in full."""
        return parts_in_full(self.options.model, self.config)

    @property
    def zero(self) -> dict[str, Any]:
        return ZERO_DEFAULTS | self.ds_settings["zero_optimization"]

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def accumulation_bytes(self) -> int:
        """Bytes of an element in which DeepSpeed adds up gradients."""
        name = self.ds_settings.get("data_types", {}).get("grad_accum_dtype")
        return {"fp32": 4, "bf16": 2, "fp16": 2}.get(name, self.dtype.itemsize)

    def offloads(self, what: str) -> bool:
        """Whether DeepSpeed keeps the "optimizer" or "param" in host memory."""
        return (self.zero.get(f"offload_{what}") or {}).get("device") == "cpu"

    def batch_shape(self) -> tuple[int, int]:
        """Samples and positions of a micro-batch."""
        data, optim = self.options.data, self.options.optim
        if optim.max_tokens_per_batch is None:
            return optim.batch_size, data.max_seq_len or DEFAULT_LENGTH
        length = min(data.max_seq_len or optim.max_tokens_per_batch, optim.max_tokens_per_batch)
        return optim.max_tokens_per_batch // length, length


def plan(setting: Setting) -> Plan:
    """Bytes of every part. Raises InputError where the base lacks what --lora_targets names."""
    weights = model_weights(setting)
    trained = [weight for weight in weights if weight.trained]
    on_device, on_host = _frozen_bytes(setting, [weight for weight in weights if not weight.trained])
    size, length = setting.batch_shape()
    taken = measure_pass(
        setting.config,
        PassSettings(
            dtype=setting.dtype,
            four_bit=setting.options.model.load_in_4bit,
            recompute_every=recompute_every(setting.options.model),
            lora=setting.options.lora,
            in_full=setting.in_full,
            tune=setting.options.tune,
            batch_size=size,
            length=length,
            on_gpu=setting.on_gpu,
            keeps_inputs=setting.stage == 3,
        ),
    )
    checkpoints, one_checkpoint = _offloaded_checkpoints(setting, size * length)
    partial = Plan(
        weights=on_device,
        quantization=sum(weight.statistics_bytes * weight.count for weight in weights),
        trained=0,
        gradients=0,
        optimizer=0,
        buckets=0,
        activations=taken.activations - checkpoints,
        logits=taken.logits,
        working=taken.working + one_checkpoint + (MATRIX_WORKSPACE_BYTES if setting.on_gpu else 0),
        gathered=_gathered_bytes(setting, weights) if setting.stage == 3 else 0,
        step=0,
        host=on_host | ({"checkpoints": checkpoints} if checkpoints else {}),
    )
    return _with_training_state(setting, partial, trained)


def _offloaded_checkpoints(setting: Setting, positions: int) -> tuple[int, int]:
    """Bytes of layers' inputs that wait in host memory, and of the one that is back at a time."""
    every = recompute_every(setting.options.model)
    if not setting.options.model.offload_checkpoints or every is None:
        return 0, 0
    one = positions * setting.config.hidden_size * setting.dtype.itemsize
    return math.ceil(setting.config.num_hidden_layers / every) * one, one


def with_checkpointing(setting: Setting, device_bytes: float) -> Setting:
    """`--activation_checkpointing auto` decided: as few layers as it takes to fit; all, where that does not suffice."""
    for choice in AUTO_CHECKPOINTING:
        decided = replace(setting, options=setting.options.replace(activation_checkpointing=choice))
        if plan(decided).total + CONTEXT_BYTES <= device_bytes:
            break
    return decided


def model_weights(setting: Setting) -> list[Weight]:
    """All parameters of the model as it is trained."""
    values = setting.config.to_dict()
    model = empty_model(config_of(values | {"num_hidden_layers": 1}), setting.dtype)
    options = setting.options
    ready = make_trainable(model, options.tune, options.lora, "", setting.dtype, setting.in_full)
    found = []
    for name, parameter in ready.named_parameters():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        in_layers, trained = plain_name.startswith("model.layers."), parameter.requires_grad
        count = setting.config.num_hidden_layers if in_layers else 1
        group = LORA if trained and not options.in_full else group_of(plain_name)
        four_bit = options.model.load_in_4bit and is_quantized_weight(plain_name)
        found.append(Weight(group, parameter.numel(), count, in_layers, four_bit, trained))
    return found


def group_of(name: str) -> str:
    """The group of GROUPS that a weight of the base belongs to."""
    for part, group in (
        ("audio_tower", "Whisper tower"), ("audio_encoder_proj", "Whisper tower"), ("norm", "norms"),
        ("embed", "embeddings"), ("lm_head", "heads"), ("audio_mlp", "audio FFN"), (".mlp.", "text FFN"),
        ("_attn", "attention"),
    ):  # fmt: skip
        if part in name:
            return group
    raise ValueError(f"{name}: belongs to no known group")


def _partition(numel: int, ranks: int) -> int:
    return math.ceil(numel / ranks)


def _frozen_bytes(setting: Setting, weights: list[Weight]) -> tuple[dict[str, int], dict[str, int]]:
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


def _gathered_bytes(setting: Setting, weights: list[Weight]) -> int:
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


def _with_training_state(setting: Setting, known: Plan, trained: list[Weight]) -> Plan:
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
