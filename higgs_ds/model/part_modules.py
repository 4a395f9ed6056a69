"""The modules of the optional parts, as subclasses of transformers' native ones."""

from __future__ import annotations

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
from higgs_ds.model.parts import ExtendedConfig, Parts, parts_of, with_parts

_ENCODER_PREFIXES = ("model.encoder.", "encoder.")  # of a Whisper checkpoint, with and without its text head


class AudioTower(nn.Module):
    """Whisper's encoder (Radford et al. 2022, arXiv 2212.04356), whose outputs are averaged in pairs: 25 a second."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.ModuleList([WhisperEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Outputs (N, T / 4, d_model) of mel features (N, bins, T), of which `lengths` (N,) are of the clip."""
        x = F.gelu(self.conv1(features.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        at = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(at)
        mask = (at < (lengths[:, None] + 1) // 2)[:, None, None]
        if self.config._attn_implementation == "eager":
            # There the original adds its mask of booleans to the scores, as numbers; elsewhere it is a mask.
            mask = mask.to(x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.layer_norm(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))


class FeatureProjector(nn.Module):
    """From the tower's width to the model's."""

    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(tower_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class AudioAttentionLayer(HiggsAudioV2DecoderLayer):
    """A decoder layer whose audio positions attend to each other before all attend to all."""

    audio_attn: HiggsAudioV2Attention
    audio_post_audio_attn_layer_norm: HiggsAudioV2RMSNorm

    def add_parts(self, config: HiggsAudioV2Config, index: int) -> None:
        """Make the modules that a native layer lacks."""
        self.audio_attn = HiggsAudioV2Attention(config, index)
        self.audio_post_audio_attn_layer_norm = HiggsAudioV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        audio_token_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """transformers' forward of a layer, for a single sequence (1, T, H), as generation calls it."""
        if len(hidden_states) != 1:
            raise NotImplementedError("audio self-attention generates for one sequence at a time")
        is_audio = audio_token_mask
        if is_audio is None:
            is_audio = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        audio = hidden_states[is_audio][None]
        normed = hidden_states.clone()
        normed[~is_audio] = self.input_layernorm(hidden_states[~is_audio])
        if audio.shape[1]:
            # Keys and values of audio positions have a cache of their own, as they are fewer.
            cache = None if past_key_values is None else vars(past_key_values).setdefault("of_audio", DynamicCache())
            rotations = [rotation[is_audio][None] for rotation in position_embeddings]
            attended, _ = self.audio_attn(
                self.audio_input_layernorm(audio), (rotations[0], rotations[1]), past_key_values=cache
            )
            audio = audio + attended
            hidden_states = hidden_states.clone()
            hidden_states[is_audio] = audio[0]
            normed[is_audio] = self.audio_post_audio_attn_layer_norm(audio)[0]
        attended, _ = self.self_attn(
            normed, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        text, audio = hidden_states[~is_audio], hidden_states[is_audio]
        result = torch.empty_like(hidden_states)
        result[~is_audio] = text + self.mlp(self.post_attention_layernorm(text))
        result[is_audio] = audio + self.audio_mlp(self.audio_post_attention_layernorm(audio))
        return result


class ModelWithTower(HiggsAudioV2Model):
    """A model with a tower."""

    audio_tower: AudioTower
    audio_encoder_proj: FeatureProjector

    def add_parts(self, config: ExtendedConfig) -> None:
        """Make the modules that a native model lacks."""
        assert config.audio_tower is not None
        self.audio_tower = AudioTower(WhisperConfig(**config.audio_tower, attn_implementation="sdpa"))
        self.audio_encoder_proj = FeatureProjector(config.audio_tower["d_model"], config.hidden_size)

    def encode_features(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings (N, T / 4, H) of mel features (N, bins, T), of which `lengths` (N,) are of the clip."""
        return self.audio_encoder_proj(self.audio_tower(features, lengths))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        audio_features: torch.Tensor | None = None,
        feature_lengths: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' forward; mel features (N, bins, T) of N clips fill the places of `<|AUDIO|>` in input_ids."""
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
    """Higgs Audio v2 with the optional parts that its configuration names."""

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
        """Add parts that the base lacks, in the dtype and on the device of its norms, without values."""
        extended = with_parts(self.config, added)
        for name in ("audio_self_attention", "audio_tower", "audio_in_token_id"):
            setattr(self.config, name, getattr(extended, name))  # all modules share this one configuration
        with init_empty_weights():
            self._make_modules(added)
        like = self.model.norm.weight
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=like.dtype, device=like.device)
                    setattr(module, name, nn.Parameter(empty, requires_grad=False))

    @torch.no_grad()
    def add_parts(self, added: Parts, whisper_folder: Path | None) -> None:
        """Add parts that the base lacks, as the identity: what they add to the model is multiplied by zero at first.

        The other weights of self-attention are drawn from torch's generator; the tower's are those of a Whisper model.

        Raises InputError where that model's files do not hold them.
        """
        self.make_parts(added)
        if added.audio_self_attention:
            for layer in self.model.layers:
                _start_attention(layer, self.config.initializer_range)
        if added.audio_tower is not None:
            assert whisper_folder is not None
            _read_encoder(self.model.audio_tower, whisper_folder)
            for parameter in self.model.audio_encoder_proj.parameters():
                parameter.zero_()


def model_class(config: HiggsAudioV2Config) -> type[HiggsAudioV2ForConditionalGeneration]:
    """What a configuration's model is built as."""
    return ExtendedModel if isinstance(config, ExtendedConfig) else HiggsAudioV2ForConditionalGeneration


def _start_attention(layer: AudioAttentionLayer, std: float) -> None:
    for name, parameter in layer.audio_attn.named_parameters():
        if name.endswith(("bias", "o_proj.weight")):
            parameter.zero_()
        else:
            # Drawn on the CPU: the same on every kind of device.
            parameter.copy_(torch.empty(parameter.shape).normal_(std=std))
    layer.audio_post_audio_attn_layer_norm.weight.copy_(layer.audio_input_layernorm.weight)


def _read_encoder(tower: AudioTower, whisper_folder: Path) -> None:
    places = weight_locations(whisper_folder)
    prefix = next((prefix for prefix in _ENCODER_PREFIXES if any(name.startswith(prefix) for name in places)), "")
    missing = [name for name, _ in tower.named_parameters() if prefix + name not in places]
    if missing:
        raise InputError(f"--whisper_ckpt {whisper_folder}: lacks {len(missing)} weights of an encoder: {missing[0]}")
    for name, parameter in tower.named_parameters():
        parameter.copy_(read_tensor(places[prefix + name], prefix + name))
