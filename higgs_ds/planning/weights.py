"""The setting to plan for, and the weights of the model in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from higgs_ds.common.precision import torch_dtype
from higgs_ds.model.config import fully_trained_parts
from higgs_ds.model.families import family_of
from higgs_ds.model.full import make_trainable
from higgs_ds.model.loading import empty_model
from higgs_ds.model.lora import AdaptedLayer, in_every_layer
from higgs_ds.model.parts import Parts
from higgs_ds.model.quantization import BLOCK_SIZE, is_quantized_weight
from higgs_ds.options.ds_config import DEEPSPEED_BUCKET_SIZE
from higgs_ds.options.train import TrainOptions
from higgs_ds.planning.batches import SampleLengths, batch_shapes

GROUPS = ("attention", "text FFN", "audio FFN", "norms", "embeddings", "heads", "Whisper tower")
LORA = "LoRA"
NESTED_BLOCK_SIZE = 256  # scales of a 4-bit weight that share a second scale; also 8-bit Adam's elements per scale
CODE_TABLES_BYTES = 4 * (16 + 256)
# DeepSpeed's defaults, in elements, for settings that a file does not have.
ZERO_DEFAULTS = {
    "reduce_bucket_size": DEEPSPEED_BUCKET_SIZE,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class Weight:
    """A parameter, or the same parameter of all decoder layers.

    Adapters, and optional parts that are trained with them, are of group LORA.
    """

    group: str
    numel: int
    count: int
    in_layers: bool
    four_bit: bool
    trained: bool

    def stored(self, element_bytes: int) -> tuple[int, int]:
        """Return the number of stored elements and their size in bytes. Two packed 4-bit weights are one byte."""
        return (math.ceil(self.numel / 2), 1) if self.four_bit else (self.numel, element_bytes)

    @property
    def statistics_bytes(self) -> int:
        """Scales of a 4-bit weight: a byte per block, a float32 per 256 blocks, an offset and code tables."""
        if not self.four_bit:
            return 0
        blocks = math.ceil(self.numel / BLOCK_SIZE)
        return blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + 4 + CODE_TABLES_BYTES


@dataclass(frozen=True)
class Setting:
    """What to plan for: a base, options and matching DeepSpeed settings, the number of ranks, and GPUs or CPUs.

    `adapted`: the layers of the adapter that a run starts from. If decoder layers differ, all are planned alike, with
    the largest rank of each of their linear layers.

    `lengths`: of the samples, where they are known.
    """

    config: Any
    options: TrainOptions
    ds_settings: dict[str, Any]
    ranks: int
    on_gpu: bool = True
    adapted: tuple[AdaptedLayer, ...] = ()
    lengths: SampleLengths | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.options.model.precision)

    @property
    def full_parts(self) -> Parts:
        """Optional parts that are fully trained."""
        return fully_trained_parts(self.options.model, self.config)

    @property
    def zero(self) -> dict[str, Any]:
        return ZERO_DEFAULTS | self.ds_settings["zero_optimization"]

    @property
    def stage(self) -> int:
        return int(self.zero["stage"])

    @property
    def accumulation_bytes(self) -> int:
        """Size in bytes of the dtype in which DeepSpeed accumulates gradients."""
        name = self.ds_settings.get("data_types", {}).get("grad_accum_dtype")
        return {"fp32": 4, "bf16": 2, "fp16": 2}.get(name, self.dtype.itemsize)

    def offloads(self, what: str) -> bool:
        """Return whether DeepSpeed keeps `what`, "optimizer" or "param", in host memory."""
        return (self.zero.get(f"offload_{what}") or {}).get("device") == "cpu"

    def batch_shapes(self) -> list[tuple[int, int]]:
        """Return the shapes to plan for; see `planning.batches`."""
        return batch_shapes(self.options, self.lengths)

    def batch_shape(self) -> tuple[int, int]:
        """Return the samples in a micro-batch with the longest sample, and the positions of each."""
        return self.batch_shapes()[0]


def model_weights(setting: Setting) -> list[Weight]:
    """List all parameters of the model in training."""
    family = family_of(setting.config.model_type)
    model = empty_model(family.with_num_layers(setting.config, 1), setting.dtype)
    options = setting.options
    adapted = in_every_layer(setting.adapted, 1)
    ready = make_trainable(model, options.tune, options.lora, "", setting.dtype, setting.full_parts, adapted)
    found = []
    for name, parameter in ready.named_parameters():
        plain_name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        in_layers, trained = plain_name.startswith(f"{family.layers}."), parameter.requires_grad
        count = setting.config.num_hidden_layers if in_layers else 1
        group = LORA if trained and not options.is_full_finetuning else group_of(plain_name)
        four_bit = options.model.load_in_4bit and is_quantized_weight(plain_name)
        found.append(Weight(group, parameter.numel(), count, in_layers, four_bit, trained))
    return found


def group_of(name: str) -> str:
    """Return the group, one of GROUPS, of a weight of the base."""
    for part, group in (
        ("audio_tower", "Whisper tower"), ("audio_encoder_proj", "Whisper tower"), ("norm", "norms"),
        ("modality", "heads"), ("embed", "embeddings"), ("head", "heads"), ("audio_mlp", "audio FFN"),
        (".mlp.", "text FFN"), ("_attn", "attention"),
    ):  # fmt: skip
        if part in name:
            return group
    raise ValueError(f"{name}: does not belong to a known group")
