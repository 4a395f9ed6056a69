"""Memory of a forward and backward pass in bytes, without weights and without computing anything.

The model runs as in training, once with two and once with three of its layers, on tensors that have shapes but no
values (torch's meta device), while every allocation and release is counted. The difference is the cost of a layer,
which is the same for each.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from higgs_ds.model.config import config_of
from higgs_ds.model.families import family_of
from higgs_ds.model.full import group_of, make_trainable
from higgs_ds.model.head_loss import CPU_CHUNKS, GPU_CHUNKS
from higgs_ds.model.loading import empty_model
from higgs_ds.model.lora import AdaptedLayer, in_every_layer
from higgs_ds.model.loss_model import LossModel
from higgs_ds.model.parts import NO_PARTS, Parts, parts_of
from higgs_ds.model.quantization import BLOCK_SIZE, is_quantized_weight
from higgs_ds.model.recomputation import checkpoint_layers
from higgs_ds.options.fields import EMBEDDINGS, FULL
from higgs_ds.options.train import LoraOptions, TuneOptions

TEXT_POSITIONS = 64  # of a speech sample: its prompt; all other positions are audio
ATTENTION = "shapes_only"  # name under which the attention below is registered with transformers
META = torch.device("meta")


@dataclass(frozen=True)
class PassSettings:
    """Everything that the memory of a pass depends on, apart from the base's configuration.

    recompute_every: every N-th layer keeps only its input.
    on_gpu: heads compute larger chunks; PEFT's dropout keeps a mask of one byte per element, where a CPU's keeps an
        element of the activations' dtype.
    keeps_inputs: linear layers keep their inputs although they are frozen, as under ZeRO-3.
    adapted: see `planning.weights.Setting`.
    """

    dtype: torch.dtype
    four_bit: bool
    recompute_every: int | None
    lora: LoraOptions
    batch_size: int
    length: int
    on_gpu: bool
    keeps_inputs: bool
    full_parts: Parts = NO_PARTS
    tune: TuneOptions = field(default_factory=TuneOptions)
    adapted: tuple[AdaptedLayer, ...] = ()

    @property
    def text_positions(self) -> int:
        """Number of text positions of each sample."""
        return min(TEXT_POSITIONS, (self.length + 1) // 2)


@dataclass(frozen=True)
class PassMemory:
    """Bytes of one pass, without parameters and their gradients.

    activations: kept by the decoder for the backward pass.
    logits: kept by the heads and the loss.
    working: what the peak needs in addition to these.
    """

    activations: int
    logits: int
    working: int


def measure_pass(config: Any, settings: PassSettings) -> PassMemory:
    """Measure a forward and backward pass over a batch of speech."""
    config_json, every = config.to_json_string(use_diff=False), settings.recompute_every
    if every is None or every == 1:
        return _measure_pass(config_json, settings)
    all_kept, none_kept = (_measure_pass(config_json, replace(settings, recompute_every=n)) for n in (None, 1))
    recomputed_share = math.ceil(config.num_hidden_layers / every) / config.num_hidden_layers
    kept = recomputed_share * none_kept.activations + (1 - recomputed_share) * all_kept.activations
    return PassMemory(round(kept), none_kept.logits, max(all_kept.working, none_kept.working))


@functools.lru_cache(maxsize=64)
def _measure_pass(config_json: str, settings: PassSettings) -> PassMemory:
    config = config_of(json.loads(config_json))
    family = family_of(config.model_type)
    two_layers, three_layers = (_run(family.with_num_layers(config, n), settings) for n in (2, 3))
    extra_layers = config.num_hidden_layers - 2
    kept, logits, peak = (
        two + extra_layers * (three - two) for two, three in zip(two_layers, three_layers, strict=True)
    )
    # Embeddings get their gradients last, when everything else is freed: a peak that does not grow with the layers.
    return PassMemory(kept, logits, max(peak, _embedding_gradients(config, settings)) - kept - logits)


def _embedding_gradients(config: Any, settings: PassSettings) -> int:
    """Return the bytes of the largest embedding gradient, or 0 if embeddings are not trained."""
    if settings.tune.finetune != FULL or EMBEDDINGS not in settings.tune.train_groups:
        return 0
    named = empty_model(config, settings.dtype).named_parameters()
    return max(parameter.nbytes for name, parameter in named if group_of(name) == EMBEDDINGS)


def _run(config: Any, settings: PassSettings) -> tuple[int, int, int]:
    """Return the bytes kept by the decoder, the bytes kept by heads and loss, and the bytes at the peak."""
    model = _model(config, settings)
    batch = _batch(config, settings)
    tensors = [*model.parameters(), *model.buffers(), *batch.values()]
    count = _AllocationCounter(tensors)
    kept: dict[int, int] = {}
    decoder_end = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in count.outside:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    model.higgs.model.norm.register_forward_pre_hook(lambda *_: decoder_end.append(sum(kept.values())))
    with count:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses, *_ = model(**batch)
        losses.sum().backward()
    return decoder_end[0], sum(kept.values()) - decoder_end[0], count.peak_bytes


def _model(config: Any, settings: PassSettings) -> LossModel:
    higgs = empty_model(config, settings.dtype)
    higgs.set_attn_implementation(ATTENTION)
    for name, module in list(higgs.named_modules()):
        if isinstance(module, nn.Linear):
            four_bit = settings.four_bit and is_quantized_weight(f"{name}.weight")
            if four_bit or settings.keeps_inputs:
                higgs.set_submodule(name, (_FourBitLinear if four_bit else _InputKeepingLinear)(module))
    if settings.recompute_every is not None:
        checkpoint_layers(higgs, settings.recompute_every)
    if parts_of(config).audio_tower is not None:
        higgs.model.audio_tower.config._attn_implementation = ATTENTION
    layers = in_every_layer(settings.adapted, config.num_hidden_layers)
    adapted = make_trainable(higgs, settings.tune, settings.lora, "", settings.dtype, settings.full_parts, layers)
    adapted.to(META)
    trained = torch.empty((), device=META, requires_grad=True)
    for module in adapted.modules():
        if type(module) is nn.Embedding and module.weight.requires_grad:
            module.weight.requires_grad_(False)  # counted by `_embedding_gradients`
            module.register_forward_hook(lambda _module, _inputs, output: _AttachToTrained.apply(output, trained))
    if settings.on_gpu:
        for name, module in list(adapted.named_modules()):
            if isinstance(module, nn.Dropout):
                adapted.set_submodule(name, _FusedDropout(module.p))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # gradients are planned separately
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model = family_of(config.model_type).loss_model(adapted).train()
    model.set_chunks(GPU_CHUNKS if settings.on_gpu else CPU_CHUNKS)
    return model


def _batch(config: Any, settings: PassSettings) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch of speech (`data.collate.Batch`) on the meta device; all audio has targets."""
    size, books = settings.batch_size, config.num_codebooks
    rows = settings.length - settings.text_positions
    num_text_targets = family_of(config.model_type).text_targets

    def ids(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.long, device=META)

    heard = {}
    tower = parts_of(config).audio_tower
    if tower is not None:  # one clip of 30 seconds per sample
        length = 2 * tower["max_source_positions"]
        outputs = min(settings.text_positions, length // 4) * size
        heard = {
            "features": torch.empty(size, tower["num_mel_bins"], length, device=META),
            "feature_lengths": ids(size),
            "feature_rows": ids(outputs),
            "feature_places": ids(outputs),
        }
    return heard | {
        "text_ids": ids(size * settings.text_positions),
        "codes": ids(size * rows, books),
        "positions": ids(size * settings.length),
        "places": ids(size, settings.length),
        "text_places": ids(size * num_text_targets),
        "text_targets": ids(size * num_text_targets),
        "audio_places": ids(size * rows),
        "audio_targets": ids(size * rows, books),
        "predicting_text": ids(size * num_text_targets),
        "predicting_audio": ids(size * rows),
        "predictions": ids(size * (num_text_targets + rows)),
        "audio_rows": ids(size, rows),
        "audio_at": ids(size * rows),
        "target_weights": torch.empty(1 + books, device=META),
    }


class _AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at the same time, except those given at the start."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.outside = {tensor.untyped_storage()._cdata for tensor in tensors}
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self.outside:
            return
        self._alive.add(key)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._untrack, key, size).atexit = False

    def _untrack(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live_bytes -= size


class _FusedAttention(torch.autograd.Function):
    """Attention that allocates like the fused kernels of CPUs and GPUs, which keep no score matrix.

    There is no such kernel for the meta device. Queries are (B, H, T, D), keys and values (B, G, T, D). Kept for the
    backward pass are these, the output and one float32 per query.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, output.new_empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)


class _CountedLinear(nn.Linear):
    """A frozen linear layer without values."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, META, linear.weight.dtype)
        self.requires_grad_(False)


class _InputKeepingLinear(_CountedLinear):
    """A linear layer that allocates like one under ZeRO-3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _InputKeepingProduct.apply(x, self.weight)


class _FourBitLinear(_CountedLinear):
    """A linear layer that allocates like one of 4 bits."""

    def dequantized(self) -> torch.Tensor:
        scales = torch.empty(self.weight.numel() // BLOCK_SIZE, device=META)
        result = torch.empty_like(self.weight)
        del scales  # they must be counted until here
        return result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _DequantizingProduct.apply(x, self).clone()  # PEFT clones the result


class _InputKeepingProduct(torch.autograd.Function):
    """x W^T that keeps x, like DeepSpeed's linear function under ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        _, weight = ctx.saved_tensors
        input_gradient = grads[0].matmul(weight) if ctx.needs_input_grad[0] else None
        return input_gradient, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _DequantizingProduct(torch.autograd.Function):
    """x W^T with a W that is dequantized in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _FourBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return x.matmul(layer.dequantized().t())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0].matmul(ctx.layer.dequantized()), None


class _AttachToTrained(torch.autograd.Function):
    """Make an output require gradients as if its weights were trained; their gradients are counted elsewhere."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


class _FusedDropout(nn.Dropout):
    """Dropout that allocates as on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]
