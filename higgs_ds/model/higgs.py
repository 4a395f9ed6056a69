"""Higgs Audio v2 as this trainer uses it. The only user of transformers' model class; its quirks live here."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.utils import GENERATION_CONFIG_NAME

from higgs_ds.errors import InputError
from higgs_ds.files import release_freed_memory
from higgs_ds.hub import read_tensor, weight_files, weight_places, weight_shapes
from higgs_ds.model import nf4
from higgs_ds.model.layout import (
    LEFTOVERS,
    MODEL_TYPES,
    NATIVE,
    native_config,
    read_json_config,
    special_tokens,
)  # fmt: skip
from higgs_ds.model.nf4 import BaseQuantization
from higgs_ds.model.offload import OnHost, kept_on_host
from higgs_ds.model.parts import NO_PARTS, Parts, config_of, model_class, parts_of, ready_for_parts
from higgs_ds.model.routed import SPOKEN_AS, TRAINED_AS, LossHead, Routing

TEXT_HEAD = "text_lm_head.weight"
# Copies of the heads, which transformers would report as unknown weights; the heads themselves are loaded.
HiggsAudioV2ForConditionalGeneration._keys_to_ignore_on_load_unexpected += LEFTOVERS


def read_config(folder: Path, asked_by: str = "--base_ckpt") -> HiggsAudioV2Config:
    """The configuration of a base in either layout. Raises InputError, beginning with `asked_by`, for anything else."""
    config = read_json_config(folder, asked_by)
    if MODEL_TYPES[config["model_type"]] != NATIVE:
        config = native_config(config, special_tokens(folder), str(folder / "config.json"))
    return config_of(config)


def describe_model(config: HiggsAudioV2Config) -> str:
    """What a model is made of, in one line; the text head is there, or `check_weights` has refused it."""
    parts = parts_of(config)
    attention = "with" if parts.audio_self_attention else "no"
    tower = "a" if parts.audio_tower else "no"
    return (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, an FFN for text and one for audio in each; "
        f"{config.num_codebooks} codebooks of {config.codebook_size}, delayed; text head; {attention} audio "
        f"self-attention, {tower} Whisper tower; {str(config.dtype).removeprefix('torch.')} in its files"
    )


def check_weights(folder: Path) -> None:
    """Raise InputError where a base's files lack the text head, which the text loss needs, or do not fit its config."""
    found = weight_shapes(weight_files(folder))
    if TEXT_HEAD not in found:
        raise InputError(
            f"{folder}: holds no {TEXT_HEAD}, which the text loss needs; use a base saved with its text head"
        )
    expected = empty_model(read_config(folder), torch.float32).state_dict()
    _check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in expected.items()}, found)


def checkpoint_layers(higgs: HiggsAudioV2ForConditionalGeneration, every: int) -> None:
    """Have every `every`-th decoder layer, from the first, keep its input alone, and run again in the backward pass."""
    higgs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for i, layer in enumerate(higgs.model.layers):
        layer.gradient_checkpointing = i % every == 0


def num_parameters(folder: Path, left_out: Parts = NO_PARTS) -> int:
    """Parameters of a base without some of its parts, by the headers of its files."""
    shapes = weight_shapes(weight_files(folder))
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in LEFTOVERS and not left_out.has(name))


def load_base(folder: Path, dtype: torch.dtype, to_add: Parts = NO_PARTS) -> HiggsAudioV2ForConditionalGeneration:
    """Load a base with its text head, every weight from its files, on the CPU, frozen.

    The text head must be asked for: transformers drops its weights silently otherwise. Parts that are `to_add` are
    added later (`ExtendedModel.add_parts`).
    """
    config = ready_for_parts(read_config(folder), to_add)
    model, info = model_class(config).from_pretrained(
        folder, config=config, use_text_head=True, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(map(str, set(info[kind]).difference(LEFTOVERS)))
        if found:
            names = ", ".join(found[:5])
            raise InputError(f"{folder}: {kind.replace('_', ' ')} in its weights: {names}")
    return model.requires_grad_(False)


def empty_model(config: HiggsAudioV2Config, dtype: torch.dtype) -> HiggsAudioV2ForConditionalGeneration:
    """A frozen model with its text head whose weights have shapes, but neither values nor memory."""
    config = copy.deepcopy(config)  # the model keeps it, and the next line would be seen by whoever reads the dtype
    config.dtype = dtype
    with init_empty_weights(include_buffers=True):
        model = model_class(config)(config, use_text_head=True)
    return model.to(dtype).requires_grad_(False)


def load_base_in_4bit(
    folder: Path, dtype: torch.dtype, quantize_on: torch.device, keep_on: torch.device, to_add: Parts = NO_PARTS
) -> tuple[HiggsAudioV2ForConditionalGeneration, BaseQuantization]:
    """Load a base with its decoder's linear layers in NF4 and all else in `dtype`, one tensor at a time, frozen.

    transformers' own loader keeps every file that it has read mapped until the end: for a base of 2.1 GiB its process
    peaked at 2.58 GiB, and at 1.15 GiB with this one.

    Args:
        quantize_on: where weights are quantized; keep_on: where they stay.
        to_add: parts that are added later, as by `load_base`.

    Raises InputError where the files and the configuration do not agree.
    """
    places = {name: path for name, path in weight_places(folder).items() if name not in LEFTOVERS}
    config = ready_for_parts(read_config(folder), to_add)
    config.dtype = dtype
    with init_empty_weights():
        model = model_class(config)(config, use_text_head=True)
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    _check_shapes(folder, expected, weight_shapes(weight_files(folder)))
    nf4.replace_linears(model, dtype)
    quantized = {}
    for name, path in places.items():
        layer, _, leaf = name.rpartition(".")
        tensor = read_tensor(path, name)
        if nf4.is_quantized_weight(name):
            weight = nf4.quantize(tensor.to(quantize_on), dtype)
            quantized[name] = weight
            nf4.fill(model.get_submodule(layer), weight)
            release_freed_memory()
        else:
            setattr(model.get_submodule(layer), leaf, nn.Parameter(tensor.to(keep_on, dtype), requires_grad=False))
    record = nf4.describe(quantized, dtype)
    for weight in quantized.values():
        weight.data = weight.data.to(keep_on)
    return model.requires_grad_(False), record


def _check_shapes(folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    problems = {
        "missing keys": sorted(expected.keys() - found.keys()),
        "unexpected keys": sorted(found.keys() - expected.keys() - set(LEFTOVERS)),
        "mismatched keys": [name for name in expected.keys() & found.keys() if expected[name] != found[name]],
    }
    if any(problems.values()):
        raise InputError(
            [f"{folder}: {kind} in its weights: {', '.join(names[:5])}" for kind, names in problems.items() if names]
        )


def load_for_generation(
    folder: Path, quantization: BaseQuantization | None, device: torch.device, to_add: Parts = NO_PARTS
) -> HiggsAudioV2ForConditionalGeneration:
    """Load a model as its users do, in the dtype of its files; or in 4 bits, for an adapter trained on such a base.

    Args:
        to_add: parts that are added later, as by `load_base`.
    """
    if quantization is not None:
        model, _ = load_base_in_4bit(folder, quantization.dtype, device, device, to_add)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.to(device)  # its buffers, too
    config = ready_for_parts(read_config(folder), to_add)
    return model_class(config).from_pretrained(folder, config=config, dtype="auto", use_safetensors=True).to(device)


class WeightSource(Protocol):
    """Where `streamed` takes weights from, when they are needed and only as long."""

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """What a linear layer makes of x (..., in), float32 (..., out)."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows of an embedding for ids (...), float32 (..., hidden)."""

    def tensor(self, name: str) -> torch.Tensor:
        """A small weight, float32."""


class _Streamed(nn.Module):
    """A linear layer or embedding whose weights lie elsewhere."""

    def __init__(self, function: Callable[[str, torch.Tensor], torch.Tensor], name: str) -> None:
        super().__init__()
        self.function, self.name = function, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.name, x)


def streamed(config: HiggsAudioV2Config, source: WeightSource) -> HiggsAudioV2ForConditionalGeneration:
    """A model in float32 that never holds more than the weights it works with."""
    config.dtype = torch.float32
    with init_empty_weights():
        model = model_class(config)(config, use_text_head=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, _Streamed(source.linear, name))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, _Streamed(source.rows, f"{name}.weight"))
        else:
            for leaf in dict(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(source.tensor(f"{name}.{leaf}"), requires_grad=False))
    return model.eval()


@torch.no_grad()
def all_logits(
    model: HiggsAudioV2ForConditionalGeneration, input_ids: torch.Tensor, audio_input_ids: torch.Tensor, **heard: Any
) -> torch.Tensor:
    """Text and audio logits of every position of one sequence, as one vector per position (N, V + C x S).

    Args:
        heard: for a model with a tower, as its forward takes them, `audio_features` and `feature_lengths`.
    """
    outputs = model.model(input_ids=input_ids, audio_input_ids=audio_input_ids, use_cache=False, **heard)
    hidden = outputs.last_hidden_state[0]
    return torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=-1)


def offload_embeddings(higgs: HiggsAudioV2ForConditionalGeneration) -> None:
    """Keep the embeddings of text and codes in host memory: of each, a step needs a few rows."""
    higgs.model.embed_tokens = OnHost(higgs.model.embed_tokens.cpu())
    higgs.model.embed_audio_tokens = OnHost(higgs.model.embed_audio_tokens.cpu())


class DualLossModel(nn.Module):
    """The model that is trained and its loss in one forward, with the heads applied only where there is a target.

    Both heads are called in every forward, on no rows if need be, so that all ranks run the same collectives.
    """

    def __init__(
        self, adapted: PeftModel | HiggsAudioV2ForConditionalGeneration, offload_checkpoints: bool = False
    ) -> None:
        """Take a model with adapters, or one whose own weights are trained.

        Args:
            offload_checkpoints: the inputs of recomputed layers wait in host memory for the backward pass.
        """
        super().__init__()
        self.adapted = adapted
        self.offload_checkpoints = offload_checkpoints
        for module in self.higgs.model.modules():
            if type(module) in TRAINED_AS:
                module.__class__ = TRAINED_AS[type(module)]
        self.higgs.text_lm_head.__class__ = LossHead
        self.higgs.audio_lm_head.__class__ = LossHead

    @contextlib.contextmanager
    def speaking(self, folder: Path) -> Iterator[PeftModel | HiggsAudioV2ForConditionalGeneration]:
        """For the block, the adapted model as transformers generates with it, by its folder's generation settings."""
        changed = [(module, type(module)) for module in self.modules() if type(module) in SPOKEN_AS]
        was_training = self.training
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.higgs.generation_config = GenerationConfig.from_pretrained(folder)
        self.eval()
        for module, trained_as in changed:
            module.__class__ = SPOKEN_AS[trained_as]
        try:
            yield self.adapted
        finally:
            for module, trained_as in changed:
                module.__class__ = trained_as
            self.train(was_training)

    @property
    def higgs(self) -> HiggsAudioV2ForConditionalGeneration:
        return self.adapted.get_base_model() if isinstance(self.adapted, PeftModel) else self.adapted

    def forward(
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        text_places: torch.Tensor,
        text_targets: torch.Tensor,
        audio_places: torch.Tensor,
        audio_targets: torch.Tensor,
        target_weights: torch.Tensor,
        audio_rows: torch.Tensor,
        audio_at: torch.Tensor,
        **heard: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, its unweighted sums, and how many targets were the likeliest, for a batch of `data.collate.Batch`.

        Args:
            target_weights: float32 (1 + C,), what one target of the text and of each codebook weighs in the loss.
            heard: the batch's features and where they go, for a model with a tower.

        Returns the weighted loss, a float32 scalar; the detached sums, float32 (1 + C,); and hits, float32
        (1 + C + 2,): of text, of each codebook, of the codes that end a stream, and how many of these there were.
        """
        hidden = self.decode(text_ids, codes, positions, places, audio_rows, audio_at, **heard)
        predicting = self.higgs.model.norm(hidden[torch.cat([text_places, audio_places])])
        text, audio = predicting.split([len(text_places), len(audio_places)])
        text_loss, text_sum, text_hits = self.higgs.text_lm_head(text, text_targets[:, None], target_weights[:1])
        audio_loss, audio_sums, audio_hits = self.higgs.audio_lm_head(audio, audio_targets, target_weights[1:])
        ends = audio_targets == self.higgs.config.audio_stream_eos_id
        of_ends = torch.stack([(audio_hits & ends).sum(), ends.sum()])
        hits = torch.cat([text_hits.sum(0), audio_hits.sum(0), of_ends]).float()
        return text_loss + audio_loss, torch.cat([text_sum, audio_sums]), hits

    def _with_heard(
        self,
        text: torch.Tensor,
        features: torch.Tensor,
        feature_lengths: torch.Tensor,
        feature_rows: torch.Tensor,
        feature_places: torch.Tensor,
    ) -> torch.Tensor:
        """Embeddings of text (M, hidden) with what the tower makes of clips at its places."""
        outputs = self.higgs.model.hear(features, feature_lengths).flatten(0, 1)
        return text.index_copy(0, feature_places, outputs.index_select(0, feature_rows).to(text.dtype))

    def decode(
        self,
        text_ids: torch.Tensor,
        codes: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        audio_rows: torch.Tensor,
        audio_at: torch.Tensor,
        **heard: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states (M + A, hidden) of all places, behind the last layer and before the last norm."""
        model = self.higgs.model
        text = model.embed_tokens(text_ids)
        if heard:
            text = self._with_heard(text, **heard)
        hidden = torch.cat([text, model.embed_audio_tokens(codes)])
        position_embeddings = model.rotary_emb(hidden, torch.arange(places.shape[1], device=places.device)[None])
        routing = Routing(len(text_ids), positions, places, audio_rows, audio_at)
        if parts_of(self.higgs.config).audio_self_attention:
            routing = routing.with_audio_rotations(position_embeddings)
        for layer in model.layers:
            offloaded = self.offload_checkpoints and layer.gradient_checkpointing
            with kept_on_host() if offloaded else contextlib.nullcontext():
                hidden = layer(hidden, routing, position_embeddings)
        return hidden
