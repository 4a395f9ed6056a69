"""The modules of the optional parts, as subclasses of transformers' native ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from transformers import DynamicCache, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, WhisperConfig
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import (
    HiggsAudioV2Attention,
    HiggsAudioV2DecoderLayer,
    HiggsAudioV2Model,
    HiggsAudioV2RMSNorm,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from higgs_ds.common.errors import InputError
from higgs_ds.common.tensor_files import read_tensor, weight_locations
from higgs_ds.model.parts import Parts, parts_of
from higgs_ds.model.v2.config import ExtendedConfig, extended
from higgs_ds.model.v2.layouts import DUPLICATE_HEADS

# Copies of the heads, which transformers would report as unknown weights; the heads themselves are loaded.
HiggsAudioV2ForConditionalGeneration._keys_to_ignore_on_load_unexpected += DUPLICATE_HEADS
# transformers 5.24 renamed the argument.
_CACHE = "cache" if "cache" in inspect.signature(HiggsAudioV2Attention.forward).parameters else "past_key_values"
_ENCODER_PREFIXES = ("model.encoder.", "encoder.")  # in a Whisper checkpoint, with and without its text head


class AudioTower(nn.Module):
    """Whisper's encoder (Radford et al. 2022, arXiv 2212.04356). Its outputs are averaged in pairs: 25 per second."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Encode mel features (N, bins, T), with `lengths` (N,) frames of the clip each, to (N, T / 4, d_model)."""
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(positions)
        mask = (positions < (lengths[:, None] + 1) // 2)[:, None, None]
        if self.config._attn_implementation == "eager":
            # In eager mode the original adds its boolean mask to the scores as 0 and 1; in other modes it masks.
            mask = mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))


class FeatureProjector(nn.Module):
    """A projection from the tower's width to the model's."""

    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(tower_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class AudioAttentionLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer in which audio positions attend to each other before the attention over all positions."""

    audio_attn: HiggsAudioV2Attention
    audio_post_audio_attn_layer_norm: HiggsAudioV2RMSNorm

    def add_parts(self, config: HiggsAudioV2Config, index: int) -> None:
        """Create the modules that a native layer does not have."""
        self.audio_attn = HiggsAudioV2Attention(config, index)
        self.audio_post_audio_attn_layer_norm = HiggsAudioV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        audio_token_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The forward of transformers' layer for a single sequence (1, T, H), as generation calls it."""
        if len(hidden_states) != 1:
            raise NotImplementedError("audio self-attention can generate only one sequence at a time")
        is_audio = audio_token_mask
        if is_audio is None:
            is_audio = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        audio = hidden_states[is_audio][None]
        normed = hidden_states.clone()
        normed[~is_audio] = self.input_layernorm(hidden_states[~is_audio])
        if audio.shape[1]:
            # Keys and values of audio positions have their own cache, because there are fewer of them.
            whole = kwargs.get(_CACHE)
            of_audio = None if whole is None else vars(whole).setdefault("of_audio", DynamicCache())
            rotations = [rotation[is_audio][None] for rotation in position_embeddings]
            attended, _ = self.audio_attn(
                self.audio_input_layernorm(audio), (rotations[0], rotations[1]), **{_CACHE: of_audio}
            )
            audio = audio + attended
            hidden_states = hidden_states.clone()
            hidden_states[is_audio] = audio[0]
            normed[is_audio] = self.audio_post_audio_attn_layer_norm(audio)[0]
        attended, _ = self.self_attn(normed, position_embeddings, attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        text, audio = hidden_states[~is_audio], hidden_states[is_audio]
        result = torch.empty_like(hidden_states)
        result[~is_audio] = text + self.mlp(self.post_attention_layernorm(text))
        result[is_audio] = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return result


class ModelWithTower(HiggsAudioV2Model):
    """A model with a Whisper tower."""

    audio_tower: AudioTower
    audio_encoder_proj: FeatureProjector

    def add_parts(self, config: ExtendedConfig) -> None:
        """Create the modules that a native model does not have."""
        assert config.audio_tower is not None
        self.audio_tower = AudioTower(WhisperConfig(**config.audio_tower, attn_implementation="sdpa"))
        self.audio_encoder_proj = FeatureProjector(config.audio_tower["d_model"], config.hidden_size)

    def encode_features(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embed mel features (N, bins, T), with `lengths` (N,) frames of the clip each, as (N, T / 4, H)."""
        return self.audio_encoder_proj(self.audio_tower(features, lengths))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        feature_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' forward, with the `<|AUDIO|>` positions of input_ids filled from mel features (N, bins, T)."""
        if input_ids is None or audio_features is None or feature_lengths is None:
            return super().forward(input_ids=input_ids, **kwargs)
        heard = self.encode_features(audio_features, feature_lengths)
        is_of_clip = torch.arange(heard.shape[1], device=heard.device) < ((feature_lengths + 1) // 2 // 2)[:, None]
        is_place = (input_ids == self.config.audio_in_token_id)[..., None]
        embedded = self.embed_tokens.register_forward_hook(
            lambda _module, _inputs, output: output.masked_scatter(is_place, heard[is_of_clip].to(output.dtype))
        )
        with embedded:
            return super().forward(input_ids=input_ids, **kwargs)


class ExtendedModel(HiggsAudioV2ForConditionalGeneration):
    """Higgs Audio v2 with the optional parts of its configuration."""

    config: ExtendedConfig
    config_class = ExtendedConfig

    def __init__(self, config: ExtendedConfig, use_text_head: bool = False) -> None:
        super().__init__(config, use_text_head)
        self._make_modules(parts_of(config))
        self.post_init()

    def _make_modules(self, parts: Parts) -> None:
        if parts.audio_self_attention:
            for index, layer in enumerate(self.model.layers):
                layer.__class__ = AudioAttentionLayer
                layer.add_parts(self.config, index)
        if parts.audio_tower is not None:
            self.model.__class__ = ModelWithTower
            self.model.add_parts(self.config)

    @torch.no_grad()
    def make_parts(self, added: Parts) -> None:
        """Add parts that the base does not have, uninitialized, in the dtype and on the device of its norms."""
        values = extended(self.config, added)
        for name in ("audio_self_attention", "audio_tower", "audio_in_token_id"):
            setattr(self.config, name, getattr(values, name))  # all modules share this one configuration
        with init_empty_weights():
            self._make_modules(added)
        norm_weight = self.model.norm.weight
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=norm_weight.dtype, device=norm_weight.device)
                    setattr(module, name, nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def add_parts(self, added: Parts, whisper_folder: Path | None) -> None:
        """Add parts that the base does not have, as the identity: their output projections start at zero.

        The other weights of self-attention are drawn from torch's generator; the tower's come from a Whisper model.

        Raises:
            InputError: weights of the encoder are missing in the Whisper model's files.
        """
        self.make_parts(added)
        if added.audio_self_attention:
            for layer in self.model.layers:
                _init_attention(layer, self.config.initializer_range)
        if added.audio_tower is not None:
            assert whisper_folder is not None
            _load_encoder(self.model.audio_tower, whisper_folder)
            for parameter in self.model.audio_encoder_proj.parameters():
                parameter.zero_()


def model_class(config: HiggsAudioV2Config) -> type[HiggsAudioV2ForConditionalGeneration]:
    """Return the class of a configuration's model."""
    return ExtendedModel if isinstance(config, ExtendedConfig) else HiggsAudioV2ForConditionalGeneration


def _init_attention(layer: AudioAttentionLayer, std: float) -> None:
    for name, parameter in layer.audio_attn.named_parameters():
        if name.endswith(("bias", "o_proj.weight")):
            parameter.zero_()
        else:
            # Drawn on the CPU, so that the values are the same on every kind of device.
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std))
    layer.audio_post_audio_attn_layer_norm.weight.copy_(layer.audio_input_layernorm.weight)


def _load_encoder(tower: AudioTower, whisper_folder: Path) -> None:
    paths = weight_locations(whisper_folder)
    prefix = next((prefix for prefix in _ENCODER_PREFIXES if any(name.startswith(prefix) for name in paths)), "")
    missing = [name for name, _ in tower.named_parameters() if prefix + name not in paths]
    if missing:
        raise InputError(
            f"--whisper_ckpt {whisper_folder}: {len(missing)} encoder weights are missing, for example {missing[0]}"
        )
    for name, parameter in tower.named_parameters():
        parameter.copy_(read_tensor(paths[prefix + name], prefix + name))
