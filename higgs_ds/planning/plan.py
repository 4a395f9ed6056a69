"""Plan the memory of each part of a training run per GPU, from the base's configuration alone.

Weights, gradients and optimizer state are computed from the model's shapes, as DeepSpeed 0.19.8 was observed to
allocate them at each ZeRO stage. Activations and working memory are counted by `activations`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from higgs_ds.options.train import recompute_every
from higgs_ds.planning.activations import PassSettings, measure_pass
from higgs_ds.planning.weights import Setting, model_weights
from higgs_ds.planning.zero_stages import Plan, frozen_bytes, gathered_bytes, with_training_state

CONTEXT_BYTES = 2**29  # assumed memory of a CUDA process before its first tensor
AUTO_CHECKPOINTING = ("none", "4", "3", "2", "every_layer")  # from the fastest to the one with the least memory
# Assumed workspace of a GPU's matrix library, which is between 8 and 32 MiB.
MATRIX_WORKSPACE_BYTES = 32 * 2**20


def plan(setting: Setting) -> Plan:
    """Plan the bytes of every part, for the micro-batch that needs the most.

    Raises:
        InputError: the base has no layers for --lora_targets.
    """
    return max((_plan(setting, *shape) for shape in setting.batch_shapes()), key=lambda planned: planned.total)


def _plan(setting: Setting, size: int, length: int) -> Plan:
    weights = model_weights(setting)
    trained = [weight for weight in weights if weight.trained]
    on_device, on_host = frozen_bytes(setting, [weight for weight in weights if not weight.trained])
    pass_memory = measure_pass(
        setting.config,
        PassSettings(
            dtype=setting.dtype,
            four_bit=setting.options.model.load_in_4bit,
            recompute_every=recompute_every(setting.options.model),
            lora=setting.options.lora,
            full_parts=setting.full_parts,
            tune=setting.options.tune,
            batch_size=size,
            length=length,
            on_gpu=setting.on_gpu,
            keeps_inputs=setting.stage == 3,
            adapted=setting.adapted,
        ),
    )
    checkpoints, checkpoint_on_device = _offloaded_checkpoints(setting, size * length)
    partial = Plan(
        shape=(size, length),
        weights=on_device,
        quantization=sum(weight.statistics_bytes * weight.count for weight in weights),
        trained=0,
        gradients=0,
        optimizer=0,
        buckets=0,
        activations=pass_memory.activations - checkpoints,
        logits=pass_memory.logits,
        working=pass_memory.working + checkpoint_on_device + (MATRIX_WORKSPACE_BYTES if setting.on_gpu else 0),
        gathered=gathered_bytes(setting, weights) if setting.stage == 3 else 0,
        step=0,
        host=on_host | ({"inputs of recomputed layers": checkpoints} if checkpoints else {}),
    )
    return with_training_state(setting, partial, trained)


def _offloaded_checkpoints(setting: Setting, positions: int) -> tuple[int, int]:
    """Return the bytes of layer inputs in host memory, and of the one that is on the device at a time."""
    every = recompute_every(setting.options.model)
    if not setting.options.model.offload_checkpoints or every is None:
        return 0, 0
    # With fp16, the layers' outputs are summed in float32.
    element = 4 if setting.dtype == torch.float16 else setting.dtype.itemsize
    input_bytes = positions * setting.config.hidden_size * element
    return math.ceil(setting.config.num_hidden_layers / every) * input_bytes, input_bytes


def with_checkpointing(setting: Setting, device_bytes: float) -> Setting:
    """Decide `--activation_checkpointing auto`: recompute as few layers as fit the memory, or all if none fits."""
    for choice in AUTO_CHECKPOINTING:
        decided = replace(setting, options=setting.options.replace(activation_checkpointing=choice))
        if plan(decided).total + CONTEXT_BYTES <= device_bytes:
            break
    return decided
